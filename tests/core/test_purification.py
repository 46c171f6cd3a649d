"""What every purification method must do and must never do; the verdict on what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from core import catalog, verdict
from core.catalog import Inputs, Kind, Need
from core.defenses.purify.nad import attention
from core.errors import ClassMissing, LabelsMissing, LayerMissing, NotEnoughCleanData, TargetInvalid, TriggerNotFound
from core.evaluation import rate
from core.images import ImageSet
from core.recovery import check_success
from core.run import Run
from tests.core.untrained import model, noise, run_method, state


def test_attention_is_blind_to_scale() -> None:
    maps = torch.rand(2, 5, 4, 4)
    assert torch.allclose(attention(maps), attention(7 * maps), atol=1e-4)
    by_hand = (maps[0] ** 2).sum(0).flatten()
    assert torch.allclose(attention(maps)[0], by_hand / by_hand.norm(), atol=1e-5)


def test_nad_refuses_maps_of_one_pixel() -> None:
    data = ImageSet(noise(40).images[:, :, :8, :8], noise(40).labels)
    with pytest.raises(LayerMissing, match="more than one pixel"):
        run_method("nad", {"epochs": 1, "betas": (1.0, 1.0, 1.0, 1.0)}, Inputs(model=model("resnet18-cifar"), clean=data))


def test_nad_weighs_small_maps_less() -> None:
    def distilled(size: int, scaled: bool, *betas: float) -> torch.Tensor:
        data = ImageSet(noise(40).images[:, :, :size, :size], noise(40).labels)
        params = {"epochs": 1, "teacher_epochs": 1, "epoch_images": 0, "augment": False, "scale_betas": scaled, "betas": betas}
        return torch.cat([value.flatten() for value in run_method("nad", params, Inputs(model=model(), clean=data)).state_dict().values()])

    assert torch.equal(distilled(16, True, 400.0), distilled(16, False, 25.0))
    assert not torch.equal(distilled(16, True, 400.0), distilled(16, False, 400.0))
    assert torch.equal(distilled(32, True, 400.0), distilled(32, False, 400.0))


def test_few_images_are_gone_through_until_an_epoch_is_long_enough() -> None:
    data = noise(30)
    assert data.repeated(30) is data and data.repeated(0) is data
    # What a tenth was kept aside of is not doubled for that.
    assert data.repeated(37) is data and len(data.repeated(38)) == 60
    longer = data.repeated(61)
    assert len(longer) == 90 and torch.equal(longer.images[30:60], data.images) and longer.labels is not None and data.labels is not None
    assert torch.equal(longer.labels[60:], data.labels)


@pytest.mark.parametrize("name", catalog.defenses())
def test_a_parameter_is_what_the_nearest_class_says(name: str) -> None:
    # Of two bases that have a field pydantic takes the first one's, also where that is only inherited and the other's is not.
    params = catalog.defenses()[name].params
    for field, found in params.model_fields.items():
        nearest = next(one for one in params.__mro__ if field in vars(one).get("__annotations__", {}))
        declared = nearest.model_fields[field]
        assert (found.default, found.title, found.description) == (declared.default, declared.title, declared.description), (field, nearest)


@pytest.mark.parametrize("name", [name for name, method in catalog.defenses().items() if "epoch_images" in method.params.model_fields])
def test_going_through_few_images_again_is_having_them_more_than_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.recovery.LEAST_SUCCESS", 0.0)
    data = ImageSet(noise(20).images, torch.arange(20) % 10)
    short = {"epochs": 1, "batch_size": 10, "learning_rate": 1e-3, **TINY.get(name, {})}
    params = {key: value for key, value in short.items() if key in catalog.defenses()[name].params.model_fields}

    def weights(images: ImageSet, count: int) -> dict[str, torch.Tensor]:
        return state(run_method(name, {**params, "epoch_images": count}, Inputs(model=model(), clean=images)))

    again, twice, once = weights(data, 40), weights(data.repeated(40), 0), weights(data, 0)
    # The inversion of a trigger stops by itself, and goes through its images once an epoch.
    if "inversion_epochs" not in catalog.defenses()[name].params.model_fields:
        assert all(torch.equal(value, twice[key]) for key, value in again.items())
    assert not all(torch.equal(value, once[key]) for key, value in again.items())


def test_needs_are_checked_before_anything_starts() -> None:
    methods, data = catalog.defenses(), noise(200)
    assert data.labels is not None
    few = data.subset(torch.arange(5))
    without = data.subset((data.labels != 3).nonzero()[:, 0])
    bare = model("vit-cifar")

    def check(name: str, inputs: Inputs, **params: Any) -> None:
        method = methods[name]
        catalog.require(method, inputs, method.params(method=name, **params))

    for name in ("mcldef", "ft_sam", "anp"):
        with pytest.raises(NotEnoughCleanData):
            check(name, Inputs(model=model(), clean=few))
    for name in ("ft_sam", "anp", "nad", "ibau"):
        with pytest.raises(LabelsMissing):
            check(name, Inputs(model=model(), clean=ImageSet(data.images)))
        with pytest.raises(ClassMissing, match="none of 3"):
            check(name, Inputs(model=model(), clean=without))
    for name in ("clp", "bnp", "anp", "rnp"):
        with pytest.raises(LayerMissing, match="no BatchNorm"):
            check(name, Inputs(model=bare, clean=data))
    with pytest.raises(TargetInvalid):
        check("mcldef", Inputs(model=model(), clean=data), target=10)
    with pytest.raises(TriggerNotFound, match=r"39\.6%"):
        check_success(0.396, 5)
    check("mcldef", Inputs(model=model(), clean=ImageSet(data.images)), target=9)
    check("clp", Inputs(model=model()))


def measured(ba: int, asr: int | None = None, anyway: int | None = None, per_class: list[int] | None = None) -> dict[str, Any]:
    rates = {"ba": (ba, 1000), "asr": (asr, 900), "asr_without_trigger": (anyway, 900)}
    found: dict[str, Any] = {name: rate(hits, count) for name, (hits, count) in rates.items() if hits is not None}
    return found | {"per_class": [rate(hits, 100) for hits in per_class or [90] * 10]}


def test_the_verdict_names_what_is_wrong() -> None:
    good = measured(900, 890), measured(890, 20)
    assert verdict.judge(*good, None, None)["verdict"] == "purified"
    # Two classes that are often confused: what remains is no backdoor.
    assert verdict.judge(measured(700, 880, 250), measured(700, 300, 250), None, None)["verdict"] == "purified"
    for before, after, aside, recovered, word in (
        (*good[:1], measured(840, 20), None, None, "accuracy on the test set"),
        (*good[:1], measured(890, 500), None, None, "still succeeds"),
        (*good[:1], measured(890, 130, 20), None, None, "still succeeds"),
        (measured(900, 20), measured(900, 60), None, None, "more often than before"),
        (None, measured(890, 500), None, None, "still succeeds"),
        (None, None, {"what": "accuracy", "before": rate(90, 100), "after": rate(80, 100)}, None, "kept aside"),
        (None, None, {"what": "agreement", "before": rate(100, 100), "after": rate(70, 100)}, None, "agrees"),
        (*good, None, {"5": {"before": rate(99, 100), "after": rate(60, 100)}}, "recovered trigger"),
    ):
        found = verdict.judge(before, after, aside, recovered)
        assert found["verdict"] == "not_purified" and word in found["reasons"][0] and found["advice"], word
    assert verdict.judge(None, None, None, None)["verdict"] == "not_measured"
    # Two errors among thirty images are chance.
    aside = {"what": "accuracy", "before": rate(30, 30), "after": rate(28, 30)}
    gone = {"5": {"before": rate(99, 100), "after": rate(0, 100)}}
    found = verdict.judge(*good, aside, gone)
    assert found["verdict"] == "purified" and found["reasons"] == [
        "the recovered trigger sends 0.0% of the images to class 5, 99.0% before",
        "the attack succeeds on 2.2% of the triggered images, 98.9% before",
    ]
    assert verdict.judge(None, None, aside, gone)["verdict"] == "purified"
    assert verdict.judge(None, measured(890, 20), None, None)["reasons"] == ["the attack succeeds on 2.2% of the triggered images"]
    # Accuracy says nothing of a backdoor.
    for pair in ((None, None), (measured(900), measured(890))):
        found = verdict.judge(*pair, aside, None)
        assert found["verdict"] == "not_measured" and "whether a backdoor is left" in found["reasons"][0] and "combined" in found["advice"]
    # Nor does a trigger that never worked, or one on a handful of images.
    idle, nine = (measured(900, 60, 20), measured(890, 10, 20)), {"before": rate(9, 9), "after": rate(0, 9)}
    for pair, recovered, word in (
        (idle, None, "did nothing before"),
        ((None, None), {"5": nine}, "9 images are too few"),
        ((measured(900) | {"asr": nine["before"]}, measured(890) | {"asr": nine["after"]}), None, "9 images are too few"),
        ((None, None), {"5": {"before": rate(15, 100), "after": rate(0, 100)}}, "did nothing before"),
    ):
        found = verdict.judge(*pair, aside, recovered)
        assert found["verdict"] == "not_measured" and word in found["reasons"][0] and "combined" in found["advice"], word
    found = verdict.judge(*idle, aside, gone)
    assert found["verdict"] == "purified" and ["did nothing before" in reason for reason in found["reasons"]] == [False, True]


def test_classes_that_lose_are_named_worst_first() -> None:
    before, after = measured(900), measured(880, per_class=[90, 84, 90, 70, 90, 90, 90, 90, 90, 87])
    assert [one["class"] for one in verdict.losers(before, after)] == [3, 1]
    assert verdict.losers(before, before) == []


def test_cross_entropy_is_what_fine_tuning_minimises() -> None:
    data = noise(64)
    tuned = run_method("fine_tuning", {"epochs": 3, "learning_rate": 0.05, "augment": False, "epoch_images": 0}, Inputs(model=model(), clean=data))
    images = data.images.float() / 255
    with torch.no_grad():
        assert data.labels is not None and F.cross_entropy(tuned(images), data.labels) < F.cross_entropy(model()(images), data.labels)


TINY: dict[str, dict[str, Any]] = {
    "mcldef": {"target": 1, "inversion_epochs": 1, "rounds": 1},
    "mcldef_plus": {"target": 1, "inversion_epochs": 1, "correction_epochs": 1},
    "mcldef_true": {"attack": {"method": "badnets", "target": 1}},
    "mesa": {"target": 1, "mesa_epochs": 1},
    "nc_unlearning": {"target": 1, "inversion_epochs": 1},
    "nad": {"teacher_epochs": 1, "betas": (1.0,)},
    "cbd": {"steps": 1},
    "sau": {"steps": 1},
    "npd": {"steps": 1, "warm_epochs": 1},
    "anp": {"iterations": 1},
    "rnp": {"unlearning_epochs": 1, "recovering_epochs": 1, "threshold": 0.01},
    "ibau": {"rounds": 1, "iterations": 1},
}


@pytest.mark.parametrize("architecture", ["vgg11-cifar", "vit-cifar", "mobilenet-v2-cifar"])
@pytest.mark.parametrize("name", [name for name, method in catalog.defenses().items() if method.kind is Kind.PURIFY])
def test_every_method_takes_every_architecture_or_says_why_not(name: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # An untrained model has no trigger to be found; that is another test.
    monkeypatch.setattr("core.recovery.LEAST_SUCCESS", 0.0)
    method, data = catalog.defenses()[name], noise(30)
    short = {"epochs": 1, "batch_size": 10, "learning_rate": 1e-3, "epoch_images": 0}
    common = {key: value for key, value in short.items() if key in method.params.model_fields}
    params = method.params(method=name, **{**common, **TINY.get(name, {})})
    inputs = Inputs(model=model(architecture), clean=ImageSet(data.images, torch.arange(30) % 10))
    try:
        catalog.require(method, inputs, params)
        outcome = method.run(Run(device="cpu"), inputs, params)
    except LayerMissing:
        without_bn = Need.BATCH_NORM in method.needs and architecture != "mobilenet-v2-cifar"
        assert without_bn or (name, architecture) == ("npd", "vit-cifar")
        return
    assert outcome.model is not None and not outcome.model.training
    assert outcome.model.state_dict().keys() == model(architecture).state_dict().keys()
    assert torch.isfinite(outcome.model(data.images[:4].float() / 255)).all()

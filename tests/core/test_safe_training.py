"""What the methods that train safely are made of, and whether they remove a backdoor from a small model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import digits
from core import catalog, encoders, evaluation, losses, poisoning, training, victim
from core.architectures.wide_resnet import WideResNet
from core.attacks.blend import Blend
from core.catalog import Inputs, Outcome
from core.classifier import Classifier, Preprocessing
from core.defenses.train import d_br, dbd, trap_and_replace
from core.defenses.train.d_br import DBR
from core.defenses.train.trap_and_replace import TrapAndReplace, add_dropout, cut_and_mix, decoder_for
from core.errors import BadDataset, SplitEmpty
from core.images import ImageSet, as_floats
from core.run import Run
from core.schooling import Divided
from core.split import Verdict, of_flags
from tests.core.untrained import noise


def test_every_split_fits_every_training() -> None:
    """The parts are exchangeable: what one method splits, another one trains on."""
    for name in ("d_br", "d_st", "retrain"):
        schema = catalog.defenses()[name].params.model_json_schema()
        assert {part["$ref"].rsplit("/", 1)[-1] for part in schema["properties"]["split"]["oneOf"]} == {
            method.params.__name__ for method in catalog.cleansers().values()
        }


SMALL: dict[str, Any] = {"architecture": "wrn-10-1", "recipe": "mcldef-augmented", "training_epochs": 1}
SEEING: dict[str, Any] = {"encoder_epochs": 1, "encoder_batch": 20}
OBSERVED = {"method": "spectral_signatures", **SMALL, "recipe": "cpu"}
MIRRORING: dict[str, dict[str, Any]] = {
    "d_br": {**SMALL, "split": OBSERVED, "rounds": 1},
    "d_st": {**SMALL, **SEEING, "split": OBSERVED, "head_epochs": 1, "compare": False},
    "retrain": {**SMALL, "split": OBSERVED, "compare": False},
    "retrain, supcon": {**SMALL, **SEEING, "split": OBSERVED, "loss": "supcon", "head_epochs": 1, "compare": False},
    "abl": {**SMALL, "isolation_epochs": 1, "epochs": 1, "unlearning_epochs": 1, "compare": False},
    "dbd": {**SMALL, **SEEING, "head_epochs": 1, "epochs": 1, "iterations": 2, "compare": False},
    "trap_and_replace": {"recipe": "trap-and-replace", "training_epochs": 1, "head_epochs": 1, "compare": False},
    "ssl_cleanse": {**SEEING, "architecture": "wrn-10-1"},
    "scan": SMALL,
}


@pytest.mark.parametrize("case", MIRRORING)
def test_a_training_mirrors_unless_told_otherwise(case: str) -> None:
    """Brightness rises from left to right in every image; two classes differ from top to bottom."""
    rising = torch.linspace(40, 215, 16).expand(40, 1, 16, 16).clone()
    rising[20:, :, :8] /= 2
    data = ImageSet(rising.to(torch.uint8), torch.arange(40) // 20)
    seen: list[torch.Tensor] = []

    def look(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Conv2d) and given[0].shape[1:] == data.images.shape[1:]:
            seen.append(given[0].detach())

    def mirrored(**more: Any) -> bool:
        seen.clear()
        name = case.partition(",")[0]
        method = catalog.defenses()[name]
        params = catalog.validate({name: method}, {"method": name, **MIRRORING[case], **more})
        with torch.nn.modules.module.register_module_forward_pre_hook(look):
            method.run(Run(device="cpu"), Inputs(clean=data, suspect=data, preprocessing=digits.GREY), params)
        # Padding, pasted boxes and cut-outs have edges of their own: most steps decide.
        return any(bool((images.diff(dim=3).sign().sum((1, 2, 3)) < 0).any()) for images in seen)

    assert mirrored() and not mirrored(mirror=False)


# -- the linear classifier on an encoder -------------------------------------------------------------------------------


def with_long_features(times: float) -> Classifier:
    """Return a backbone whose features are this many times as long as an untrained one's."""
    model = victim.untrained(Run(device="cpu"), "long", "wrn-10-1", digits.load().train, digits.GREY)
    network = model.network
    assert isinstance(network, WideResNet)
    with torch.no_grad():
        network.bn1.weight.mul_(times)
        network.bn1.bias.mul_(times)
    return model.eval()


def test_the_highest_rate_is_that_of_the_features_second_moments() -> None:
    data, model = digits.load().train.subset(torch.arange(60)), with_long_features(3)
    moments = np.zeros((65, 65))
    with torch.no_grad():
        for image in data.images:
            feature = np.append(model.features(as_floats(image[None]))[0].double().numpy(), 1.0)
            moments += np.outer(feature, feature) / 60
    curvature = max(np.linalg.eigvalsh(moments)) / 2
    assert encoders.highest_rate(Run(device="cpu"), model, data) == pytest.approx(2 * (1 + 0.9) / curvature, rel=1e-5)


@pytest.mark.parametrize("bound", [True, False])
def test_a_linear_classifier_of_long_features_diverges_unless_its_rate_is_bound(bound: bool) -> None:
    data, model = digits.load().train, with_long_features(10)
    assert data.labels is not None
    labels = data.labels
    history = encoders.train_head(
        Run(device="cpu"), "head", model, data, lambda logits, which: F.cross_entropy(logits, labels[which]), epochs=10,
        schedule=training.steps((0, 5.0)), batch_size=512, how=encoders.Heading(mirror=False, bound_rate=bound),
    )  # fmt: skip
    # Ten digits that are not told apart at all cost log(10).
    assert history[-1] < math.log(10) if bound else history[-1] > math.log(10)


def test_a_rate_that_is_stable_stays_as_it_is() -> None:
    data = digits.load().train
    assert data.labels is not None
    labels = data.labels
    ends = []
    for bound in (True, False):
        model = with_long_features(0.01)
        encoders.train_head(
            Run(device="cpu"), "head", model, data, lambda logits, which: F.cross_entropy(logits, labels[which]), epochs=1,
            schedule=training.steps((0, 0.5)), batch_size=512, how=encoders.Heading(bound_rate=bound),
        )  # fmt: skip
        ends.append(model.head.weight)
    assert torch.equal(*ends)


# -- D-BR --------------------------------------------------------------------------------------------------------------


def test_unlikelihood_is_exact_where_one_minus_p_rounds_to_zero() -> None:
    logits, labels = torch.tensor([[1.0, 2.0, 0.5], [30.0, 0.0, 0.0], [-40.0, 3.0, 3.0]]), torch.tensor([1, 0, 0])
    expected = [
        -math.log(sum(one for other, one in enumerate(row) if other != label)) for row, label in zip(logits.double().softmax(1).tolist(), labels, strict=True)
    ]
    found = losses.unlikelihood(logits.requires_grad_(), labels)
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    # It is p itself: full where the label is certain, none where it is out of the question.
    assert slope[[0, 1, 2], labels].tolist() == pytest.approx(logits.detach().softmax(1)[[0, 1, 2], labels].tolist(), abs=1e-6)


def test_a_blend_is_unlearnt_under_the_statistics_it_is_deployed_with() -> None:
    """As published this backdoor stays whole, however far the cross-entropy of the poisoned batches rises."""
    data = digits.load()
    made = poisoning.plan(Run(device="cpu"), Blend(method="blend", target=5, alpha=0.3), data.train)
    triggered = poisoning.triggered(data.test, made.trigger, 10)
    trained: dict[str, Any] = {"architecture": "wrn-10-1", "recipe": "cpu", "training_epochs": 15}
    given = {"method": "d_br", **trained, "split": {"method": "scan", **trained}}
    params = catalog.validate({"d_br": catalog.defenses()["d_br"]}, given)
    assert isinstance(params, DBR)
    inputs = Inputs(clean=data.clean, suspect=poisoning.poison(data.train, made).data, preprocessing=digits.GREY)
    outcome = d_br.run(Run(device="cpu"), inputs, params)

    def rates(model: Classifier | None) -> tuple[float, float]:
        assert model is not None
        found = evaluation.evaluate(model, data.test, triggered)
        return found["ba"]["value"], found["asr"]["value"]

    (ba_before, asr_before), (ba, asr) = rates(outcome.baseline), rates(outcome.model)
    assert asr_before > 0.95 and asr < 0.03
    assert ba > ba_before - 0.02


@pytest.mark.parametrize(("verdict", "named", "wanted"), [("poisoned", 1, 3), ("inconclusive", 1, 5), ("poisoned", None, 5)])
def test_only_what_carries_the_named_class_is_unlearnt(monkeypatch: pytest.MonkeyPatch, verdict: Verdict, named: int | None, wanted: int) -> None:
    data = noise(20, classes=2)
    assert data.labels is not None
    flagged = torch.zeros(20, dtype=torch.bool)
    flagged[(data.labels == 1).nonzero()[:3, 0]] = True
    flagged[(data.labels == 0).nonzero()[:2, 0]] = True

    def unlearnt(flagged: torch.Tensor, **more: Any) -> int:
        split = of_flags(data.labels, flagged.float(), flagged, "", verdict=verdict, evidence="", target=named)
        divided = Divided(Outcome(split=split), split, split.part(data, split.clean), split.part(data, split.suspect))
        monkeypatch.setattr(d_br, "divide", lambda run, inputs, params: divided)
        params = catalog.validate({"d_br": catalog.defenses()["d_br"]}, {"method": "d_br", **MIRRORING["d_br"], **more})
        assert isinstance(params, DBR)
        found: int = d_br.run(Run(device="cpu"), Inputs(suspect=data), params).findings["unlearnt"]
        return found

    assert unlearnt(flagged) == wanted and unlearnt(flagged, only_target=False) == 5
    if wanted == 3:
        with pytest.raises(SplitEmpty, match="carries class 1"):
            unlearnt(flagged & (data.labels == 0))


# -- Trap-and-Replace --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [4, 5, 6])
def test_the_decoder_draws_images_of_the_right_size(end: int) -> None:
    data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))
    trap = victim.untrained(Run(device="cpu"), "x", f"wrn-16-1-trap-{end}", data, Preprocessing((0.0,) * 3, (1.0,) * 3))
    module = trap_and_replace.FORMS[f"wrn-16-1-trap-{end}"][0]
    assert decoder_for(trap, module, torch.rand(1, 3, 32, 32))(trap.network.stem(torch.rand(2, 3, 32, 32))).shape == (2, 3, 32, 32)  # type: ignore[operator]
    with pytest.raises(BadDataset, match="cannot be rebuilt"):
        decoder_for(trap, module, torch.rand(1, 3, 31, 31))


def test_cutmix_keeps_the_share_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(8.0)[:, None, None, None].expand(8, 1, 16, 16).clone()
    for _ in range(20):
        mixed, other, kept = cut_and_mix(images, generator)
        for index in range(8):
            own = float((mixed[index] == index).float().mean())
            assert own == pytest.approx(1.0 if int(other[index]) == index else kept)
            assert set(mixed[index].unique().tolist()) <= {float(index), float(other[index])}


def test_the_stem_does_not_change_when_the_head_is_replaced() -> None:
    data = digits.load()
    events: list[dict[str, Any]] = []
    params = TrapAndReplace(method="trap_and_replace", recipe="cpu", training_epochs=1, head_epochs=2, compare=False)
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    def watch(model: Any) -> None:
        state = {name: value.clone() for name, value in model.network.state_dict().items()}
        (after if before else before).update(state)

    inputs = Inputs(clean=data.clean, suspect=data.train.subset(torch.arange(300)), preprocessing=digits.GREY, watch=watch)
    outcome = trap_and_replace.run(Run(device="cpu", emit=events.append), inputs, params)
    assert outcome.model is not None and outcome.model.architecture.name == "wrn-16-1-replaced-5"
    fresh = {name for name in before if "_aux" in name}
    # Parameters and buffers: the stem's BatchNorm must not move either.
    assert all(torch.equal(before[name], after[name]) for name in before if name not in fresh)
    assert any(not torch.equal(before[name], after[name]) for name in fresh)


def test_the_error_of_the_reconstruction_is_that_of_the_clean_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits.load()
    decoders: list[torch.nn.Module] = []

    def seen(*given: Any) -> torch.nn.Module:
        decoders.append(decoder_for(*given))
        return decoders[-1]

    monkeypatch.setattr(trap_and_replace, "decoder_for", seen)
    params = TrapAndReplace(method="trap_and_replace", recipe="cpu", training_epochs=1, head_epochs=1, compare=False)
    outcome = trap_and_replace.run(Run(device="cpu"), Inputs(clean=data.clean, suspect=data.train.subset(torch.arange(300)), preprocessing=digits.GREY), params)
    assert outcome.model is not None
    with torch.no_grad():
        images = data.clean.images.float() / 255
        drawn = decoders[0].eval()(outcome.model.network.stem(images))  # type: ignore[operator]
    assert outcome.findings["reconstruction_error"] == pytest.approx(float(((drawn - images) ** 2).mean()), rel=1e-4)


def test_dropout_lies_between_the_convolutions_and_before_the_last_norm() -> None:
    data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))
    model = victim.untrained(Run(device="cpu"), "x", "wrn-16-1-replaced-5", data, Preprocessing((0.0,) * 3, (1.0,) * 3))
    hooks = add_dropout(model, 0.5)
    assert len(hooks) == 2
    images = torch.rand(4, 3, 32, 32)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    for hook in hooks:
        hook.remove()


# -- DBD ---------------------------------------------------------------------------------------------------------------


def test_mixmatch_without_mixing_is_cross_entropy_and_squared_error() -> None:
    data = digits.load().train.subset(torch.arange(8))
    model = victim.untrained(Run(device="cpu"), "x", "wrn-10-1", data, digits.GREY).eval()
    images, views = data.images.float() / 255, (torch.rand(8, 1, 16, 16), torch.rand(8, 1, 16, 16))
    assert data.labels is not None
    wanted = F.one_hot(data.labels, 10).float()
    # A beta distribution this wide never mixes: its draws are 0 or 1.
    params = dbd.DBD(method="dbd", mixing=1e-6)
    found = dbd.mixmatch(model, images, wanted, views, params, 3.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        guess = torch.stack([model(view).softmax(1) for view in views]).mean(0) ** 2
        guess = guess / guess.sum(1, keepdim=True)
        error = torch.stack([(model(view).softmax(1) - guess).square().mean() for view in views]).mean()
        expected = F.cross_entropy(model(images), data.labels) + 3.0 * error
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-4)

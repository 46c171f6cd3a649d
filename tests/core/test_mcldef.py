"""MCLDef and its trigger distributions: the corrections of features, the calibration, the rounds; MESA's bound and place."""

from __future__ import annotations

import pytest
import torch

from core import catalog, contrast, mesa
from core.catalog import Inputs
from core.defenses.purify.mcldef import any_of
from core.errors import EngineError
from core.images import ImageSet
from core.run import Run
from tests.core.untrained import model, noise, run_method


def test_mutual_information_bound() -> None:
    joint, apart = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    assert float(mesa.information(joint, apart)) == pytest.approx(float(joint.mean() - apart.exp().mean().log()))


def test_mesa_changes_only_its_place() -> None:
    place = mesa.Place(3, 1, 2)
    maker = mesa.Generator(3, place, 16).eval()
    images = torch.rand(5, 3, 12, 10)
    stamped = maker.stamp(images, torch.Generator().manual_seed(0))
    changed = (stamped != images).any(1).any(0).nonzero()
    assert changed.min(0).values.tolist() == [7, 6] and changed.max(0).values.tolist() == [9, 8]
    assert not torch.equal(stamped[0, :, 7:10, 6:9], stamped[1, :, 7:10, 6:9])
    mask, pattern = maker.picture(torch.Size((3, 12, 10)), torch.Generator())
    assert mask.sum() == 9 and (pattern[:, mask == 0] == 0).all()
    with pytest.raises(EngineError, match="outside"):
        mesa.Place(3, 8, 0).cut(12, 10)


def test_correction_of_equal_features_is_minus_one() -> None:
    classifier = model()
    inputs = Inputs(model=classifier, clean=noise(40))
    params = contrast.Contrast(bn="frozen", augment=False, epoch_images=0)
    student = classifier.frozen_copy().requires_grad_(True)
    losses = contrast.correct(Run(device="cpu"), inputs, classifier.frozen_copy(), student, lambda images, generator: images, params, epochs=1, rate=1e-9)
    assert losses[0] == pytest.approx(-1, abs=1e-3)


def test_calibration_predicts_every_class_as_often_as_before() -> None:
    teacher, data = model(), noise(200)
    student = teacher.frozen_copy().requires_grad_(True)
    with torch.no_grad():
        student.head.bias.add_(torch.linspace(-1, 1, 10))
    shifts = contrast.calibrate(Run(device="cpu"), Inputs(model=teacher, clean=data), teacher, student)
    images = data.images.float() / 255
    with torch.no_grad():
        before, after = teacher(images).softmax(1).mean(0), student(images).softmax(1).mean(0)
    assert torch.allclose(before, after, atol=1e-3)
    assert sorted(shifts, reverse=True) == shifts


def test_calibration_uses_no_labels_and_can_be_left_out() -> None:
    data = noise(60)
    params = {"attack": {"method": "badnets", "target": 1}, "epochs": 1, "epoch_images": 0, "batch_size": 20}
    one = run_method("mcldef_true", params, Inputs(model=model(), clean=data))
    two = run_method("mcldef_true", params, Inputs(model=model(), clean=ImageSet(data.images)))
    bare = run_method("mcldef_true", {**params, "calibrate": False}, Inputs(model=model(), clean=data))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    different = [name for name, value in one.state_dict().items() if not torch.equal(value, bare.state_dict()[name])]
    assert different == ["network.fc.bias"]


def test_rounds_go_on_while_a_small_trigger_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # An untrained model has no trigger to be found: what is inverted in a pass is about as large as where it began, in every round.
    monkeypatch.setattr("core.recovery.LEAST_SUCCESS", 0.0)
    inputs = Inputs(model=model(), clean=noise(40))
    method = catalog.defenses()["mcldef"]

    def outcome(rounds: int, growth: float) -> catalog.Outcome:
        params = method.params(method="mcldef", target=1, inversion_epochs=1, epochs=1, epoch_images=0, batch_size=20, rounds=rounds, growth=growth)
        return method.run(Run(device="cpu"), inputs, params)

    def same(one: catalog.Outcome, two: catalog.Outcome) -> bool:
        assert one.model is not None and two.model is not None
        return all(torch.equal(value, two.model.state_dict()[name]) for name, value in one.model.state_dict().items())

    single, stopped, twice, thrice = outcome(1, 2.5), outcome(3, 1e-3), outcome(2, 2.5), outcome(3, 2.5)
    assert "left" not in single.findings and [len(one.findings["left"]) for one in (stopped, twice, thrice)] == [1, 1, 2]
    # The one trigger found afterwards was too large to be the backdoor's: the model of the first round stands.
    assert same(single, stopped) and not same(single, twice) and not same(twice, thrice)
    assert thrice.findings["left"][0] == twice.findings["left"][0] != thrice.findings["left"][1]


def test_each_batch_gets_one_of_the_triggers() -> None:
    generator = torch.Generator().manual_seed(0)
    stamp = any_of([lambda images, generator: images + 1, lambda images, generator: images + 2])
    seen = [float(stamp(torch.zeros(1), generator)) for _ in range(50)]
    assert set(seen) == {1.0, 2.0}

"""FCT: its transformations, its split, and what it says of a set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.transforms import functional as T

from benchmarks import digits
from core import catalog, victim
from core.augment import TRANSFORMATIONS, rotate, translate
from core.catalog import Inputs
from core.defenses.cleanse.fct import FCT, divide, sensitivity
from core.images import ImageSet
from core.run import Run


def test_rotation_is_torchvisions() -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = rotate()(images, torch.Generator().manual_seed(4))
    angles = (torch.rand(5, generator=torch.Generator().manual_seed(4)) * 2 - 1) * 180
    for index, angle in enumerate(angles.tolist()):
        wanted = T.rotate(images[index : index + 1].float(), angle)[0].to(torch.uint8)
        # Where a sample falls between two pixels, rounding may go either way.
        assert float((found[index] == wanted).float().mean()) > 0.97


def test_translation_moves_by_whole_pixels_and_leaves_black_behind() -> None:
    images = torch.randint(1, 256, (20, 1, 20, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved = translate()(images, torch.Generator().manual_seed(1))
    shifts = set()
    for before, after in zip(images[:, 0], moved[:, 0], strict=True):
        rows, columns = after.any(1).nonzero()[:, 0], after.any(0).nonzero()[:, 0]
        down = int(rows[0]) or int(rows[-1]) - 19
        right = int(columns[0]) or int(columns[-1]) - 9
        assert abs(down) <= 4 and abs(right) <= 2
        wanted = torch.roll(before, (down, right), (0, 1))
        assert torch.equal(after[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], wanted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        shifts.add((down, right))
    assert len(shifts) > 5


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("floats", [True, False])
def test_every_transformation_keeps_shape_type_and_range_and_follows_its_generator(name: str, floats: bool) -> None:
    images: torch.Tensor = torch.randint(0, 256, (6, 3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images.float() / 255 if floats else images
    found, again = (TRANSFORMATIONS[name](images, torch.Generator().manual_seed(7)) for _ in range(2))
    assert found.shape == images.shape and found.dtype == images.dtype and torch.equal(found, again)
    assert not torch.equal(found, images) and float(found.max()) <= (1 if floats else 255) and float(found.min()) >= 0


def fct(**params: Any) -> FCT:
    return FCT(method="fct", **params)


def test_the_thresholds_of_the_split() -> None:
    scores, labels = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float(), torch.zeros(1000, dtype=torch.int64)
    clean, poisoned = divide(Run(), scores, labels, 1, fct())
    assert int(clean.sum()) == 201 and int(poisoned.sum()) == 50
    assert set(scores[clean].tolist()) == set(map(float, range(201))) and float(scores[poisoned].min()) == 950
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    again = divide(Run(), scores[order], labels, 1, fct())
    assert torch.equal(again[0], clean[order]) and torch.equal(again[1], poisoned[order])


def test_ties_at_zero_are_all_clean_as_published_or_drawn() -> None:
    scores = torch.cat([torch.zeros(500), torch.arange(1.0, 501)])
    labels = (torch.arange(1000) >= 250).long()
    assert int(divide(Run(), scores, labels, 2, fct())[0].sum()) == 500
    clean, poisoned = divide(Run(), scores, labels, 2, fct(ties="random"))
    assert int(clean.sum()) == 201 and int(poisoned.sum()) == 50 and not bool((clean & poisoned).any())
    clean, _ = divide(Run(), scores, labels, 2, fct(stratified=True, ties="random"))
    assert clean[:250].sum() == 51 and clean[250:].sum() == 151


def test_what_no_transformation_moves_scores_zero() -> None:
    data = digits.load().train.subset(torch.arange(50))
    model = victim.untrained(Run(device="cpu"), "x", "wrn-10-1", data, digits.GREY)
    assert float(sensitivity(Run(), model, data, fct(transformations=["flip", "flip"])).abs().max()) == 0
    moved = sensitivity(Run(), model, data, fct())
    with torch.no_grad():
        images = data.images.float() / 255
        generator = Run().generator("fct", "transformations")
        changed = TRANSFORMATIONS["affine"](TRANSFORMATIONS["rotate"](images, generator), generator)
        wanted = (model.eval().features(images) - model.features(changed)).square().sum(1)
    assert torch.allclose(moved, wanted, atol=1e-5) and float(moved.min()) > 0


def test_collapsed_features_neither_flag_nor_acquit() -> None:
    # No transformation moves a black image.
    black = ImageSet(torch.zeros(60, 1, 16, 16, dtype=torch.uint8), torch.arange(60) % 3)
    split = catalog.cleansers()["fct"].run(Run(device="cpu"), Inputs(suspect=black, preprocessing=digits.GREY), fct(architecture="wrn-10-1", epochs=1)).split
    assert split.verdict == "inconclusive" and "60 of 60 images are equally sensitive" in split.evidence
    assert not split.suspect.any() and not split.clean.any() and split.kept.all()


@pytest.mark.parametrize("rewind", [True, False])
def test_a_collapsed_tuning_is_rewound_or_acquits_nothing(monkeypatch: pytest.MonkeyPatch, rewind: bool) -> None:
    # Class 2 is sensitive after half of the tuning; at its end only a few images of all classes still move.
    labels = torch.arange(200) % 4
    halfway, late = torch.where(labels == 2, 9.0, 1.0) + torch.arange(200) / 1000, torch.where(torch.arange(200) < 20, 1.0, 0.0) * (1 + torch.arange(200))
    measured = iter([halfway, late] if rewind else [late])
    monkeypatch.setattr("core.defenses.cleanse.fct.sensitivity", lambda *_: next(measured))
    data = ImageSet(digits.load().train.images[:200], labels)
    params = fct(architecture="wrn-10-1", epochs=1, tuning_epochs=2, rewind=rewind)
    outcome = catalog.cleansers()["fct"].run(Run(device="cpu"), Inputs(suspect=data, preprocessing=digits.GREY), params)
    assert outcome.split is not None and outcome.findings["rewound"] is rewind
    if rewind:
        assert set(labels[outcome.split.suspect].tolist()) == {2} and outcome.split.verdict == "poisoned" and int(outcome.split.clean.sum()) == 41
    else:
        assert outcome.split.verdict == "inconclusive" and "90% of the images do not move" in outcome.split.evidence


@pytest.mark.parametrize(("own", "verdict"), [(9, "inconclusive"), (19, "poisoned")])
def test_a_class_that_is_merely_more_sensitive_than_others_is_not_called_poisoned(monkeypatch: pytest.MonkeyPatch, own: int, verdict: str) -> None:
    labels = torch.arange(400) % 10
    scores = torch.arange(400) / 1000
    scores[(labels == 3).nonzero()[:own, 0]] += 1
    scores[(labels != 3).nonzero()[: 20 - own, 0]] += 1
    monkeypatch.setattr("core.defenses.cleanse.fct.sensitivity", lambda *_: scores)
    data = ImageSet(digits.load().train.images[:400], labels)
    params = fct(architecture="wrn-10-1", epochs=1, tuning_epochs=0)
    split = catalog.cleansers()["fct"].run(Run(device="cpu"), Inputs(suspect=data, preprocessing=digits.GREY), params).split
    assert split is not None and int(split.suspect.sum()) == 20
    assert (split.verdict, split.target) == (verdict, 3)
    assert bool(split.missed) == (verdict == "poisoned")
    assert ("only 45% of the sensitive images carry one label" in split.evidence) == (verdict == "inconclusive")


@pytest.mark.parametrize(
    ("said", "target", "words"),
    [
        (("no_evidence", "one group a class"), None, ""),
        (("inconclusive", "confirms only 40%"), None, ""),
        (("poisoned", "two groups"), 3, "is still in the set"),
    ],
)
def test_where_nothing_is_sensitive_the_activations_decide(monkeypatch: pytest.MonkeyPatch, said: tuple[str, str], target: int | None, words: str) -> None:
    monkeypatch.setattr("core.defenses.cleanse.fct.sensitivity", lambda *_: 1 + torch.arange(400) / 1000)
    monkeypatch.setattr("core.defenses.cleanse.fct.observed", lambda *_: (*said, target))
    data = ImageSet(digits.load().train.images[:400], torch.arange(400) % 10)
    params = fct(architecture="wrn-10-1", epochs=1, tuning_epochs=0)
    split = catalog.cleansers()["fct"].run(Run(device="cpu"), Inputs(suspect=data, preprocessing=digits.GREY), params).split
    assert split is not None and (split.verdict, split.target) == (said[0], target)
    assert (
        "the share of sensitive images" in split.evidence and split.evidence.endswith(said[1]) and words in split.missed and bool(split.missed) == bool(words)
    )

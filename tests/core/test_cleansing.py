"""What cleansers are made of, against slow and obvious references."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as T

from benchmarks import digits
from core import activations, advice, catalog, encoders, losses, page, training, victim
from core import split as splits
from core.activations import collect
from core.attacks.badnets import BadNets
from core.augment import TRANSFORMATIONS, rotate, translate
from core.catalog import Inputs
from core.classifier import Preprocessing
from core.defenses.cleanse import beatrix, scan, spectral_signatures, spectre, ssl_cleanse
from core.defenses.cleanse.fct import FCT, divide, sensitivity
from core.defenses.cleanse.ssl_cleanse import SSLCleanse, judge
from core.errors import ClassMissing, ClassTooSmall, LabelsMissing, OneClassOnly, SplitEmpty
from core.images import ImageSet
from core.neighbours import Neighbourhood, neighbourhood
from core.run import Run
from core.schooling import divide as divide_set

GREY = Preprocessing((0.0,), (1.0,), "unit")


def embedding(count: int = 200, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return F.normalize(torch.randn(count, width, generator=generator) + F.one_hot(labels, width), dim=1), labels


# -- neighbours --------------------------------------------------------------------------------------------------------


def slowly(features: torch.Tensor, labels: torch.Tensor, k: int, tau: float) -> tuple[list[list[int]], list[list[float]]]:
    votes, energies = [], []
    z = features.double()
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        nearest = sorted(others, key=lambda j: -float(z[i] @ z[j]))[:k]
        votes.append([sum(int(labels[j]) == c for j in nearest) for c in range(4)])
        pull = {j: math.exp(float(z[i] @ z[j]) / tau) for j in others}
        total = sum(pull.values())
        members = [[j for j in others if int(labels[j]) == c] for c in range(4)]
        energies.append([math.log(sum(pull[j] for j in mine) / len(mine) / total) for mine in members])
    return votes, energies


@pytest.mark.parametrize("block", [7, 64, 500])
def test_votes_and_energies_are_the_naive_ones_whatever_the_block(block: int) -> None:
    features, labels = embedding()
    near = neighbourhood(Run(device="cpu"), "near", features, labels, 4, k=20, temperature=0.3, block=block)
    votes, energies = slowly(features, labels, 20, 0.3)
    assert near.votes.tolist() == votes
    assert torch.allclose(near.energies.double(), torch.tensor(energies, dtype=torch.float64), atol=1e-5)
    # The class sums are the whole sum: sum_c n_c(i) exp(S_c(i)) = 1.
    sizes = torch.bincount(labels, minlength=4)[None] - F.one_hot(labels, 4)
    assert torch.allclose((sizes * near.energies.exp()).sum(1), torch.ones(200), atol=1e-5)


def test_ties_go_to_the_nearer_label_and_then_to_the_smaller_index() -> None:
    votes = torch.tensor([[2, 2, 0], [1, 2, 1], [2, 2, 2]])
    near = Neighbourhood(votes, torch.tensor([[0.5, 0.9, 0.0], [3.0, 0.1, 0.1], [0.4, 0.4, 0.4]]), torch.zeros(3, 3))
    elected, share = near.elected()
    assert elected.tolist() == [1, 1, 0] and share.tolist() == pytest.approx([0.5, 0.5, 1 / 3])


def test_neighbours_of_one_label_accept_everything() -> None:
    labels = torch.arange(3).repeat_interleave(20)
    features = F.normalize(F.one_hot(labels, 3).float() + 0.01 * torch.rand(60, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    near = neighbourhood(Run(device="cpu"), "near", features, labels, 3, k=19)
    elected, share = near.elected()
    assert torch.equal(elected, labels) and bool((share == 1).all())
    split, _ = judge(near, labels, SSLCleanse(method="ssl_cleanse"))
    assert bool(split.kept.all()) and torch.equal(split.labels, labels) and bool((split.scores == 0).all())


def test_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    features, labels = embedding()
    wanted = neighbourhood(Run(device="cpu"), "near", features, labels, 4, k=20, block=20)
    run = Run(device="cpu", folder=tmp_path, config="c", checkpoint_seconds=0)
    run.stopping = True
    from core.errors import Cancelled

    with pytest.raises(Cancelled):
        neighbourhood(run, "near", features, labels, 4, k=20, block=20)
    again = neighbourhood(Run(device="cpu", folder=tmp_path, config="c"), "near", features, labels, 4, k=20, block=20)
    assert torch.equal(again.votes, wanted.votes) and torch.equal(again.energies, wanted.energies)


@pytest.mark.parametrize(("k", "temperature"), [(0, 0.5), (200, 0.5), (5, 0.01)])
def test_senseless_comparisons_are_refused(k: int, temperature: float) -> None:
    features, labels = embedding()
    with pytest.raises(ValueError, match=r"neighbours|temperature"):
        neighbourhood(Run(device="cpu"), "near", features, labels, 4, k=k, temperature=temperature)


# -- SSL cleansing -----------------------------------------------------------------------------------------------------


def opinion(accepted: list[float], rejected: list[float]) -> tuple[Neighbourhood, torch.Tensor]:
    """Images of class 0 whose elected class is 0 (accepted) or 1, with these shares of 1000 votes."""
    shares = torch.tensor(accepted + rejected)
    first = torch.tensor([True] * len(accepted) + [False] * len(rejected))
    high, low = (shares * 1000).round().long(), (1000 - shares * 1000).round().long()
    votes = torch.stack([torch.where(first, high, low), torch.where(first, low, high)], 1)
    return Neighbourhood(votes, votes.float(), votes.float().div(1000).log()), torch.zeros(len(shares), dtype=torch.int64)


def test_surely_wrong_labels_are_corrected_and_doubtful_images_dropped() -> None:
    # The 80th percentile of 0.501 … 0.600 is 0.5802, by linear interpolation.
    near, labels = opinion([0.5 + step / 1000 for step in range(1, 101)], [0.580, 0.581, 0.6])
    split, found = judge(near, labels, SSLCleanse(method="ssl_cleanse"))
    assert found["thresholds"]["knn"] == pytest.approx(0.5802)  # type: ignore[index]
    assert bool(split.kept[:100].all()) and split.kept[100:].tolist() == [False, True, True]
    assert split.labels[100:].tolist() == [0, 1, 1] and bool(split.suspect[100:].all()) and not bool(split.clean[100:].any())
    split, _ = judge(near, labels, SSLCleanse(method="ssl_cleanse", relabel=False))
    assert split.kept[100:].tolist() == [False, False, False] and torch.equal(split.labels, labels)


def test_both_filters_must_agree() -> None:
    votes = torch.tensor([[9, 1, 0], [1, 9, 0], [9, 1, 0], [1, 9, 0], [1, 9, 0]])
    energies = torch.tensor([[9.0, 1, 0], [9.0, 1, 0], [1.0, 9, 0], [1.0, 9, 0], [1.0, 0, 9]])
    near = Neighbourhood(votes, votes.float(), energies)
    split, _ = judge(near, torch.zeros(5, dtype=torch.int64), SSLCleanse(method="ssl_cleanse", filter="both", percentile=0, relabel=True))
    assert split.clean.tolist() == [True, False, False, False, False]
    # Corrected only where both are sure of the same other class; surer than the only accepted image none of them is.
    assert split.kept.tolist() == [True, False, False, False, False]


def test_a_label_among_strangers_is_poison_and_one_among_its_like_is_not() -> None:
    # Classes 0 and 1 are taken for each other; images of all classes carry label 3.
    looks = torch.arange(4).repeat_interleave(100)
    labels = looks.clone()
    labels[:30], labels[100:130] = 1, 0
    assert ssl_cleanse.among_strangers(labels, looks, 4) == pytest.approx([0.0, 0.0, 0.0, 0.0])
    labels[90:100] = labels[190:200] = labels[290:300] = 3
    assert ssl_cleanse.among_strangers(labels, looks, 4) == pytest.approx([0.0, 0.0, 0.0, 0.1])


def test_an_encoder_that_knows_little_never_says_that_a_set_is_clean() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (300,), generator=generator)
    near = neighbourhood(Run(), "near", F.normalize(torch.randn(300, 8, generator=generator), dim=1), labels, 6, k=25)
    split, _ = judge(near, labels, SSLCleanse(method="ssl_cleanse"))
    assert split.verdict == "inconclusive" and "train it longer" in split.evidence


# -- losses ------------------------------------------------------------------------------------------------------------


def by_pairs(views: torch.Tensor, positives: list[set[int]], tau: float) -> float:
    z = F.normalize(views.double(), dim=1)
    total = 0.0
    for a, mine in enumerate(positives):
        below = math.log(sum(math.exp(float(z[a] @ z[b]) / tau) for b in range(len(z)) if b != a))
        total -= sum(float(z[a] @ z[p]) / tau - below for p in mine) / len(mine)
    return total / len(positives)


def positives(labels: list[int], clean: list[bool], *, symmetric: bool) -> list[set[int]]:
    count = len(labels)
    found = []
    for view in range(2 * count):
        i = view % count
        images = {i} | ({j for j in range(count) if labels[j] == labels[i] and (clean[j] or not symmetric)} if clean[i] else set())
        found.append({j + half for j in images for half in (0, count)} - {view})
    return found


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_semi_supervised_loss_is_the_sum_over_pairs(symmetric: bool) -> None:
    labels, clean = [0, 0, 1, 1, 0], [True, True, True, False, False]
    views = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    alike = losses.alike_where_clean(torch.tensor(labels), torch.tensor(clean), symmetric=symmetric)
    found = losses.supervised_contrastive(views[:5], views[5:], alike, temperature=0.1)
    assert float(found) == pytest.approx(by_pairs(views, positives(labels, clean, symmetric=symmetric), 0.1), rel=1e-5)
    scaled = losses.supervised_contrastive(views[:5], views[5:], alike, temperature=0.1, base_temperature=0.07)
    assert float(scaled) == pytest.approx(float(found) * 0.1 / 0.07)


def test_the_masks_are_simclr_supcon_and_differ_only_in_columns_of_images_that_are_not_clean() -> None:
    labels, clean = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([True, True, True, False, False])
    nobody, everybody = torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    assert torch.equal(losses.alike_where_clean(labels, nobody), torch.eye(5, dtype=torch.bool))
    assert torch.equal(losses.alike_where_clean(labels, everybody), labels[:, None] == labels[None])
    differing = losses.alike_where_clean(labels, clean) ^ losses.alike_where_clean(labels, clean, symmetric=False)
    assert bool(differing.any()) and not bool(differing[:, clean].any()) and not bool(differing[~clean].any())
    views = torch.randn(10, 6, generator=torch.Generator().manual_seed(2))
    simclr = losses.supervised_contrastive(views[:5], views[5:], torch.eye(5, dtype=torch.bool), temperature=0.5)
    assert float(simclr) == pytest.approx(float(losses.info_nce(views[:5], views[5:], temperature=0.5, symmetric=True)), rel=1e-6)


def test_similarities_are_exact_under_mixed_precision() -> None:
    views = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    alike = torch.eye(32, dtype=torch.bool)
    wanted = losses.supervised_contrastive(views[:32], views[32:], alike, temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.supervised_contrastive(views[:32], views[32:], alike, temperature=0.05)
        again = losses.info_nce(views[:32], views[32:], temperature=0.05)
        centres = losses.intra_class(views, torch.arange(64) % 5)
    assert float(centres) == float(losses.intra_class(views, torch.arange(64) % 5))
    assert float(found) == float(wanted) and float(again) == float(losses.info_nce(views[:32], views[32:], temperature=0.05))


def test_intra_class_loss() -> None:
    eye = torch.eye(3).repeat(2, 1)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert float(losses.intra_class(eye, labels)) == 0
    # Three identical centres: (C' - 1) / C'. A class that is not in the batch plays no part.
    assert float(losses.intra_class(torch.ones(6, 3), labels)) == pytest.approx(2 / 3)
    assert float(losses.intra_class(torch.ones(6, 3), torch.tensor([0, 5, 9, 0, 5, 9]))) == pytest.approx(2 / 3)
    dead = torch.zeros(6, 3, requires_grad=True)
    value = losses.intra_class(dead, labels)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.item() == 0 and dead.grad is not None and bool(torch.isfinite(dead.grad).all())


def test_mixed_cross_entropy_takes_an_empty_part_for_zero() -> None:
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1])
    poisoned = torch.tensor([False, False, True, True, False, True])
    each = F.cross_entropy(logits, labels, reduction="none")
    wanted = each[~poisoned].mean() - 0.5 * each[poisoned].mean()
    assert float(losses.mixed_cross_entropy(logits, labels, poisoned, weight=0.5)) == pytest.approx(float(wanted))
    none = torch.zeros(6, dtype=torch.bool)
    assert float(losses.mixed_cross_entropy(logits, labels, none, weight=0.5)) == pytest.approx(float(each.mean()))
    assert float(losses.mixed_cross_entropy(logits, labels, ~none, weight=0.5)) == pytest.approx(-0.5 * float(each.mean()))


def test_the_other_losses_of_safe_training() -> None:
    assert float(losses.total_variation(torch.full((2, 3, 4, 4), 0.7))) == 0
    images = torch.zeros(1, 1, 2, 2)
    images[0, 0, 0, 0] = 3.0
    assert float(losses.total_variation(images)) == pytest.approx((9 + 9) / 4)
    logits, labels = torch.tensor([[4.0, 0.0], [0.0, 0.0]], requires_grad=True), torch.tensor([0, 0])
    each = F.cross_entropy(logits, labels, reduction="none")
    value = losses.gradient_ascent_trap(logits, labels, gamma=0.5)
    assert value.item() == pytest.approx(float(((-each[0] + each[1]) / 2).detach()))
    chances = torch.tensor([[0.9, 0.1]]).log()
    found = losses.symmetric_cross_entropy(chances, torch.tensor([0]))
    assert float(found) == pytest.approx(-0.1 * math.log(0.9) - (0.1 * math.log(1e-4)), rel=1e-5)


def test_the_schedule_of_contrastive_training() -> None:
    rate = training.warmed_cosine(200, 0.5)

    def at(epoch: int) -> float:
        return 0.5 * (1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * epoch / 200)) / 2)

    assert rate(0) == 0.01 and rate(5) == pytest.approx((0.01 + at(10)) / 2)
    assert rate(10.5) == pytest.approx(at(11)) and rate(199) == pytest.approx(at(200)) == pytest.approx(5e-4)
    assert training.warmed_cosine(20, 0.5)(2) == pytest.approx(0.5 * (1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * 3 / 20)) / 2))


# -- transformations ---------------------------------------------------------------------------------------------------


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


# -- FCT ---------------------------------------------------------------------------------------------------------------


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
    model = victim.untrained(Run(device="cpu"), "x", "wrn-10-1", data, GREY)
    assert float(sensitivity(Run(), model, data, fct(transformations=["flip", "flip"])).abs().max()) == 0
    moved = sensitivity(Run(), model, data, fct())
    with torch.no_grad():
        images = data.images.float() / 255
        generator = Run().generator("fct", "transformations")
        changed = TRANSFORMATIONS["affine"](TRANSFORMATIONS["rotate"](images, generator), generator)
        wanted = (model.eval().features(images) - model.features(changed)).square().sum(1)
    assert torch.allclose(moved, wanted, atol=1e-5) and float(moved.min()) > 0


# -- activations -------------------------------------------------------------------------------------------------------


def test_collapsed_features_neither_flag_nor_acquit() -> None:
    # No transformation moves a black image.
    black = ImageSet(torch.zeros(60, 1, 16, 16, dtype=torch.uint8), torch.arange(60) % 3)
    split = catalog.cleansers()["fct"].run(Run(device="cpu"), Inputs(suspect=black, preprocessing=GREY), fct(architecture="wrn-10-1", epochs=1)).split
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
    outcome = catalog.cleansers()["fct"].run(Run(device="cpu"), Inputs(suspect=data, preprocessing=GREY), params)
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
    split = catalog.cleansers()["fct"].run(Run(device="cpu"), Inputs(suspect=data, preprocessing=GREY), params).split
    assert split is not None and int(split.suspect.sum()) == 20
    assert (split.verdict, split.target) == (verdict, 3)
    assert ("only 45% of the sensitive images carry one label" in split.evidence) == (verdict == "inconclusive")


def contaminated(count: int = 400, poison: int = 60, width: int = 12, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features of classes around their own centres, labels, and which images of class 2 really lie elsewhere."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(classes, width, generator=generator)
    labels = torch.arange(classes).repeat_interleave(count)
    features = centres[labels] + torch.randn(len(labels), width, generator=generator)
    bad = torch.zeros(len(labels), dtype=torch.bool)
    bad[2 * count : 2 * count + poison] = True
    features[bad] += 3 * torch.randn(width, generator=generator)
    return features, labels, bad


def test_spectral_signatures_are_the_top_singular_direction() -> None:
    features, labels, bad = contaminated()
    own = features[labels == 2]
    scores, share = spectral_signatures.signature(own)
    _, values, directions = np.linalg.svd((own - own.mean(0)).double().numpy(), full_matrices=False)
    assert np.allclose(scores.numpy(), ((own - own.mean(0)).double().numpy() @ directions[0]) ** 2, rtol=1e-4, atol=1e-4)
    assert share == pytest.approx(values[0] ** 2 / (values**2).sum())
    flagged = spectral_signatures.highest(torch.where(labels == 2, torch.cat([torch.zeros(800), scores, torch.zeros(1200)]), 0), labels == 2, 0.15)
    assert int(flagged.sum()) == int(1.5 * 0.15 * 400) and float(bad[flagged].float().mean()) > 0.6


def test_clusters_find_the_guests_of_a_class() -> None:
    features, labels, bad = contaminated()
    smaller, distance, silhouette = activations.clusters(features[labels == 2].double().numpy(), 10, 0)
    assert np.array_equal(smaller, bad[labels == 2].numpy()) and silhouette > 0.2 and bool((distance[smaller] > 0).all())


def test_quantum_entropy_weighs_with_a_matrix_exponential() -> None:
    from scipy.linalg import expm

    white = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).double().numpy() * [3, 1, 1, 1]
    scores = spectre.entropy_scores(white, 4.0)
    covariance = np.cov(white.T)
    weights = expm(4 * (covariance - np.eye(4)) / (np.linalg.eigvalsh(covariance)[-1] - 1))
    wanted = [x @ (weights / np.trace(weights)) @ x for x in white]
    assert np.allclose(scores, wanted)
    features, labels, bad = contaminated()
    found, _, dimensions = spectre.quantum_entropy(features[labels == 2].double().numpy(), 0.15, 4.0)
    assert dimensions in (1, 4, 9) and float(bad[labels == 2].numpy()[np.argsort(found)[-60:]].mean()) > 0.9


def test_the_components_of_identity_and_variation_are_found() -> None:
    generator = np.random.default_rng(0)
    between, within = np.diag([9.0, 4.0, 1.0]), np.array([[1.0, 0.5, 0], [0.5, 1.0, 0], [0, 0, 0.25]])
    labels = np.repeat(np.arange(300), 8)
    points = generator.multivariate_normal(np.zeros(3), between, 300)[labels] + generator.multivariate_normal(np.zeros(3), within, 2400)
    found = scan.components(points - points.mean(0), labels)
    assert np.allclose(found[0], between, atol=1.2) and np.allclose(found[1], within, atol=0.06)


def test_a_class_is_cut_where_two_groups_explain_it_best() -> None:
    features, labels, bad = contaminated()
    ratios = []
    for label in range(6):
        points = features[labels == label].double().numpy()
        side, ratio = activations.untangle(points, np.eye(points.shape[1]))
        ratios.append(ratio)
        if label == 2:
            foreign = side(points) > 0
            foreign = foreign if foreign.mean() < 0.5 else ~foreign
            assert np.array_equal(foreign, bad[labels == 2].numpy())
            # Twice the gain in log likelihood an image, by the definition.
            parts = [points[foreign], points[~foreign]]
            gain = ((points - points.mean(0)) ** 2).sum() - sum(((part - part.mean(0)) ** 2).sum() for part in parts)
            assert ratio == pytest.approx(gain / len(points))
    assert ratios[2] > 2 * max(ratio for label, ratio in enumerate(ratios) if label != 2)


def knowing(features: torch.Tensor, labels: torch.Tensor) -> Any:
    """Return a classifier that takes features for the class whose centre is nearest."""
    centres = torch.stack([features[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
    head = torch.nn.Linear(*centres.T.shape)
    with torch.no_grad():
        head.weight.copy_(2 * centres)
        head.bias.copy_(-centres.square().sum(1))
    return SimpleNamespace(head=head)


def test_a_contaminated_class_stands_out_without_clean_images() -> None:
    features, labels, _ = contaminated()
    gains = activations.two_groups(features, labels, 6)
    assert max(range(6), key=lambda label: gains[label]) == 2
    verdict, evidence, target = activations.observed(knowing(features, labels), features, labels, 6, 0)
    assert (verdict, target) == ("poisoned", 2) and "class 2" in evidence
    clean = labels != 2
    features, labels = features[clean], labels[clean] - (labels[clean] > 2).long()
    assert activations.observed(knowing(features, labels), features, labels, 5, 0)[0] != "poisoned"


def test_guests_in_every_class_keep_a_set_from_being_acquitted() -> None:
    features, labels, _ = contaminated()
    one = labels != 2
    features, labels = features[one], labels[one] - (labels[one] > 2).long()
    model = knowing(features, labels)
    assert activations.observed(model, features, labels, 5, 0)[0] == "no_evidence"
    ignorant = knowing(features, labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))])
    verdict, evidence, _ = activations.observed(ignorant, features, labels, 5, 0)
    assert verdict == "inconclusive" and "of the labels, train it longer" in evidence
    guests = torch.arange(len(labels)) % 10 == 0
    features[guests] = features[guests] + 40 * F.one_hot(labels[guests], 12)
    verdict, evidence, target = activations.observed(model, features, labels, 5, 0)
    assert (verdict, target) == ("inconclusive", None) and "two clear clusters" in evidence


def test_gram_matrices_take_the_power_first() -> None:
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = beatrix.grams(maps, 3)
    assert found.shape == (2, 3 * 6)
    flat = maps.flatten(2)
    for index, order in enumerate((1, 2, 3)):
        for image in range(2):
            wanted = []
            for i in range(3):
                for j in range(i, 3):
                    value = float((flat[image, i] ** order * flat[image, j] ** order).sum())
                    wanted.append(math.copysign(abs(value) ** (1 / order), value))
            assert found[image, 6 * index : 6 * index + 6].tolist() == pytest.approx(wanted, rel=1e-4)


def test_a_set_of_which_no_image_deviates_is_not_acquitted_for_that() -> None:
    features, labels, _ = contaminated()
    nearest = knowing(features, labels).head

    class Looked:
        """A classifier that has these features and these predictions, and one feature map for every image."""

        head = nearest

        def rows(self, images: torch.Tensor) -> torch.Tensor:
            return (images[:, 0, 0] * 255).round().long() @ torch.tensor([256, 1])

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return F.one_hot(labels[self.rows(images)], 6).float()

        def eval(self) -> Looked:
            return self

        def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [torch.ones(len(images), 2, 4, 4)]

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return features[self.rows(images)]

    numbers = torch.arange(len(labels))
    data = ImageSet(torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8)[:, None, None], labels)
    inputs = Inputs(model=Looked(), suspect=data, clean=data.subset(numbers[::7]))  # type: ignore[arg-type]
    split = beatrix.run(Run(), inputs, beatrix.Beatrix(method="beatrix")).split
    assert split is not None and (split.verdict, split.target) == ("poisoned", 2)
    assert "anomaly index" in split.evidence and "class 2" in split.evidence


def test_deviations_start_outside_the_usual_range() -> None:
    known = torch.arange(21.0)[:, None]
    limits = beatrix.bounds(known, torch.zeros(21, dtype=torch.int64), 1.0)
    assert (float(limits[0][0]), float(limits[0][1])) == (5.0, 15.0)
    rows = torch.tensor([[5.0], [15.0], [18.0], [4.0], [99.0]])
    assert beatrix.deviations(rows, torch.tensor([0, 0, 0, 0, 1]), limits).tolist() == pytest.approx([0, 0, 3 / 15, 1 / 5, 0])
    run = Run()
    near, far = torch.randn(60, 4), torch.randn(60, 4) + 3
    assert beatrix.discrepancy(near, far, run) > 10 * abs(beatrix.discrepancy(near, torch.randn(60, 4), run))
    assert beatrix.discrepancy(near, far[:3], run) == 0


# -- the split of a set ------------------------------------------------------------------------------------------------


def flags(verdict: splits.Verdict) -> tuple[ImageSet, splits.Split]:
    data = ImageSet(torch.zeros(6, 1, 16, 16, dtype=torch.uint8), torch.tensor([0, 0, 0, 1, 1, 1]), ("a", "b"), tuple("uvwxyz"))
    assert data.labels is not None
    flagged = torch.tensor([True, False, False, False, True, False])
    split = splits.of_flags(data.labels, torch.tensor([0.9, 0.1, 0.2, 0.1, 0.8, 0.0]), flagged, "why", verdict=verdict, evidence="seen")
    return data, split


def test_a_set_without_evidence_keeps_its_images_unless_told_otherwise() -> None:
    for verdict, trust, kept in (("no_evidence", True, 6), ("no_evidence", False, 4), ("poisoned", True, 4), ("inconclusive", True, 4)):
        data, split = flags(verdict)  # type: ignore[arg-type]
        assert data.labels is not None
        settled = split.settled(data.labels, splits.Cleansing(trust_verdict=trust))
        assert len(settled.cleansed(data)) == kept


def test_manifest_and_summary_say_the_same(tmp_path: Path) -> None:
    data, split = flags("poisoned")
    assert data.labels is not None
    splits.write_manifest(Run(folder=tmp_path), split, data)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(line["name"], line["action"], line["reason"]) for line in lines[:2]] == [("u", "dropped", "why"), ("v", "kept", "")]
    found = splits.summary(split, data.labels, 2)
    assert found["counts"] == {"kept": 4, "relabelled": 0, "dropped": 2} and found["per_class"]["dropped"] == [1, 1]
    assert sum(found["histogram"]["counts"]["dropped"]) == 2 and len(found["histogram"]["edges"]) == 41
    bars = page.bars(found["histogram"])
    assert max(bar["height"] + 0 for bar in bars) <= page.HEIGHT and {bar["colour"] for bar in bars} == {"#4e79a7", "#b3261e"}


def test_one_class_that_differs_from_the_others_is_evidence() -> None:
    alike = [0.1, 0.11, 0.09, 0.1, 0.12, 0.08, 0.1, 0.11, 0.09, 0.1]
    assert splits.stands_out(alike, "x")[0] == "no_evidence" and splits.stands_out(alike, "x")[2] is None
    assert splits.stands_out([*alike[:9], 0.5], "x")[::2] == ("poisoned", 9)
    assert splits.stands_out([0.1, 0.9], "x")[0] == "inconclusive"


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ([20, 0], OneClassOnly, "one class, 'a'"),
        ([20, 3], ClassTooSmall, r"fewer than 10 images cannot be judged: b \(3\)"),
        ([20, 20, 0], ClassMissing, "no image of c"),
    ],
)
def test_sets_that_cannot_be_judged(sizes: list[int], error: type[Exception], words: str) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    data = ImageSet(torch.zeros(len(labels), 1, 16, 16, dtype=torch.uint8), labels, tuple("abc"[: len(sizes)]))
    method = catalog.cleansers()["fct"]
    with pytest.raises(error, match=words):
        catalog.require(method, Inputs(suspect=data), fct())
    with pytest.raises(LabelsMissing):
        catalog.require(method, Inputs(suspect=ImageSet(data.images)), fct())


def test_a_split_without_a_part_is_refused() -> None:
    data = digits.load().train.subset(torch.arange(200))
    with pytest.raises(SplitEmpty, match="no image for poisoned"):
        divide_set(Run(device="cpu"), Inputs(suspect=data, preprocessing=GREY), fct(architecture="wrn-10-1", epochs=1, tuning_epochs=0, poisoned_share=0.001))


def test_a_given_model_is_taken_instead_of_training_one() -> None:
    data = digits.poisoned(digits.load().train, BadNets(method="badnets", target=5, sampling="S2"))
    model = victim.untrained(Run(device="cpu"), "x", "wrn-10-1", data, GREY)
    events: list[dict[str, Any]] = []
    run = Run(device="cpu", emit=events.append)
    outcome = spectral_signatures.run(run, Inputs(model=model, suspect=data), spectral_signatures.SpectralSignatures(method="spectral_signatures"))
    assert {event["data"]["phase"] for event in events if event["type"] == "phase"} == {"decomposing"}
    assert outcome.embedding is not None and torch.equal(outcome.embedding, collect(run, model.eval().features, data))


def test_an_encoder_brings_the_views_of_an_image_together() -> None:
    data = digits.load().train
    run = Run(device="cpu")
    params = SSLCleanse(method="ssl_cleanse", architecture="wrn-10-1", encoder_epochs=8, encoder_batch=128, projector="mlp")
    encoder = encoders.untrained(run, "encoder", data, params, GREY)
    history = encoders.contrast(run, "encoder", encoder, data, params, temperature=0.5)
    assert history[-1] < history[0] - 0.3
    assert data.labels is not None
    near = neighbourhood(run, "near", encoders.embed(run, encoder, data), data.labels, 10, k=50)
    # Without a label, ten digits are told apart far better than by chance.
    assert float((near.elected()[0] == data.labels).float().mean()) > 0.4


def test_ssl_cleansing_finds_wrong_labels_in_a_good_embedding() -> None:
    data = digits.load().train
    assert data.labels is not None
    poison = digits.poisoned(data, BadNets(method="badnets", target=5, sampling="S2"))
    assert poison.labels is not None
    bad = poison.labels != data.labels
    # An embedding that knows the digits, as a long training would give it.
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(4 * F.one_hot(data.labels, 10) + torch.randn(len(data), 10, generator=generator), dim=1)
    near = neighbourhood(Run(), "near", features, poison.labels, 10, k=50)
    for name in ("knn", "energy", "both"):
        split, _ = judge(near, poison.labels, ssl_cleanse.SSLCleanse(method="ssl_cleanse", filter=name))  # type: ignore[arg-type]
        assert (split.verdict, split.target) == ("poisoned", 5)
        assert float(split.clean[bad].float().mean()) < 0.05 and float(split.clean[~bad].float().mean()) > 0.9
        corrected = split.relabelled(poison.labels)
        assert int(corrected.sum()) and float((split.labels == data.labels)[corrected].float().mean()) > 0.95


# -- which method ------------------------------------------------------------------------------------------------------


def test_what_is_proposed_exists_and_needs_no_more_than_it_says() -> None:
    for proposal in advice.PROPOSALS:
        method = catalog.defenses()[proposal.method]
        params = catalog.validate({method.name: method}, proposal.defense)
        assert method.kind is proposal.kind and catalog.needs(method, params) - {catalog.Need.BATCH_NORM} <= proposal.needs
        # What a network is made of is not something to bring: the sentence says it.
        assert (catalog.Need.BATCH_NORM in method.needs) == ("BatchNorm" in proposal.why)
    everything = advice.propose(list(catalog.Need))
    assert everything == list(advice.PROPOSALS)
    assert [one.method for one in advice.propose([catalog.Need.MODEL])] == ["mm_bd", "clp"]
    assert [one.method for one in advice.propose([catalog.Need.SUSPECT_DATASET])] == ["ssl_cleanse", "d_br"]

"""The cleansers that look at activations, against slow and obvious references."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core import activations
from core.catalog import Inputs
from core.defenses.cleanse import beatrix, scan, spectral_signatures, spectre
from core.images import ImageSet
from core.run import Run


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


def test_what_a_method_leaves_of_the_poison_is_said() -> None:
    features, labels, bad = contaminated()
    assert activations.overlooked(features, labels, 6, 2, bad) == ""
    some = bad & (torch.arange(len(bad)) % 3 > 0)
    assert "whichever is the poison, 33% of it" in activations.overlooked(features, labels, 6, 2, some)
    # Flags that follow neither group.
    said = activations.overlooked(features, labels, 6, 2, torch.arange(len(bad)) % 10 == 0)
    assert "class 2" in said and ("of 60 and 340 images" in said or "of 340 and 60 images" in said) and "90% of it" in said
    for verdict, target, missed in (("poisoned", 2, True), ("poisoned", None, False), ("inconclusive", 2, False)):
        split = activations.flagged_by(features, labels, 6, torch.zeros(len(bad)), some, "why", verdict=verdict, evidence="", target=target)
        assert bool(split.missed) == missed and torch.equal(split.suspect, some)


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
    # Products of the eighth powers of such activations are beyond float32.
    large = beatrix.grams(3000 * maps, 8)
    assert large.isfinite().all() and torch.allclose(large, 3000**2 * beatrix.grams(maps, 8), rtol=1e-4)


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
    assert beatrix.deviations(rows, torch.tensor([0, 0, 0, 0, 1]), limits).tolist() == pytest.approx([0, 0, 3 / 15, 1 / 5, float("nan")], nan_ok=True)
    run = Run()
    near, far = torch.randn(60, 4), torch.randn(60, 4) + 3
    assert beatrix.discrepancy(near, far, run) > 10 * abs(beatrix.discrepancy(near, torch.randn(60, 4), run))
    assert beatrix.discrepancy(near, far[:3], run) == 0

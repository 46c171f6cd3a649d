from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from core import losses
from core.losses import info_nce, model_contrastive


def slow(student: torch.Tensor, clean: torch.Tensor, poisoned: torch.Tensor, temperature: float) -> float:
    """Eqs. 3 and 4 of MCLDef, one image at a time."""
    total = 0.0
    for z, c, p in zip(student.double(), clean.double(), poisoned.double(), strict=True):
        positive = math.exp(float(z @ c / (z.norm() * c.norm())) / temperature)
        negative = math.exp(float(z @ p / (z.norm() * p.norm())) / temperature)
        total += -math.log(positive / (positive + negative))
    return total / len(student)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 7])
def test_equals_the_slow_form(temperature: float, count: int) -> None:
    parts = [torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert float(model_contrastive(*parts, temperature=temperature)) == pytest.approx(slow(*parts, temperature), rel=1e-5)


def test_equals_two_way_cross_entropy() -> None:
    z, c, p = (torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    logits = torch.stack([F.cosine_similarity(z, c), F.cosine_similarity(z, p)], dim=1) / 0.5
    assert model_contrastive(z, c, p, temperature=0.5).item() == pytest.approx(F.cross_entropy(logits, torch.zeros(5, dtype=torch.long)).item(), rel=1e-5)


def test_bounds_with_non_negative_features() -> None:
    z = torch.rand(9, 8) + 0.01
    c, p = torch.rand(9, 8) + 0.01, z.clone()
    at_start = model_contrastive(z, c, p, temperature=0.5).item()
    assert at_start >= math.log(2)
    assert model_contrastive(c, c, p, temperature=0.5).item() >= math.log1p(math.exp(-2)) - 1e-6


def test_zero_features_give_no_nan() -> None:
    assert torch.isfinite(model_contrastive(torch.zeros(2, 4), torch.ones(2, 4), torch.ones(2, 4), temperature=0.5))


# -- safe training ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_equals_the_slow_form(count: int, temperature: float) -> None:
    a, b = (torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def one_way(a: torch.Tensor, b: torch.Tensor) -> float:
        total = 0.0
        for i in range(count):

            def sim(x: torch.Tensor, i: int = i) -> float:
                return math.exp(float(a[i].double() @ x.double() / (a[i].double().norm() * x.double().norm())) / temperature)

            total -= math.log(sim(b[i]) / (sum(sim(a[k]) for k in range(count) if k != i) + sum(sim(b[k]) for k in range(count))))
        return total / count

    assert float(info_nce(a, b, temperature=temperature)) == pytest.approx(one_way(a, b), rel=1e-4, abs=1e-6)
    both = (one_way(a, b) + one_way(b, a)) / 2
    assert float(info_nce(a, b, temperature=temperature, symmetric=True)) == pytest.approx(both, rel=1e-4, abs=1e-6)

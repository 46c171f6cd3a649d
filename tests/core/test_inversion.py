from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core import inversion
from core.classifier import Classifier
from core.images import VALUES, ImageSet
from core.run import Run
from tests.core.untrained import some_images, tiny


def test_stamp_keeps_replaces_and_passes_gradients() -> None:
    images = torch.rand(2, 3, 4, 4)
    pattern = torch.rand(3, 4, 4, requires_grad=True)
    mask = torch.full((4, 4), 0.5, requires_grad=True)
    assert torch.equal(inversion.stamp(images, torch.zeros(4, 4), pattern), images)
    assert torch.equal(inversion.stamp(images, torch.ones(4, 4), pattern), pattern.expand(2, -1, -1, -1))
    inversion.stamp(images, mask, pattern).sum().backward()
    assert mask.grad is not None and pattern.grad is not None
    assert mask.grad.abs().sum() > 0 and pattern.grad.abs().sum() > 0


def test_anomaly_index_flags_only_the_small_one() -> None:
    norms = [20, 21, 19, 20, 22, 2, 20, 21, 19, 20]
    assert inversion.flagged(norms) == [5]
    median = np.median(norms)
    spread = 1.4826 * np.median(np.abs(np.array(norms) - median))
    assert inversion.anomaly_index(norms)[5] == pytest.approx(18 / spread)


def test_median_of_an_even_count_is_numpys() -> None:
    norms = [1.0, 2.0, 3.0, 10.0]
    assert inversion.anomaly_index(norms)[0] == pytest.approx(1.5 / (1.4826 * 1.0))


def test_no_spread_is_no_anomaly() -> None:
    assert inversion.flagged([5.0] * 10) == []
    assert not inversion.anomaly_index([5.0] * 10).any()


def reference_costs(accuracies: list[float], threshold: float, initial: float, patience: int, factor: float) -> list[float]:
    """The schedule of Neural Cleanse, one label, written out step by step."""
    cost, set_, up, down, costs = 0.0, 0, 0, 0, []
    for accuracy in accuracies:
        if cost == 0 and accuracy >= threshold:
            set_ += 1
            if set_ >= patience:
                cost, up, down = initial, 0, 0
        else:
            set_ = 0
        if accuracy >= threshold:
            up, down = up + 1, 0
        else:
            down, up = down + 1, 0
        if up >= patience:
            up, cost = 0, cost * factor
        elif down >= patience:
            down, cost = 0, cost / factor**1.5
        costs.append(cost)
    return costs


def test_dynamic_cost_follows_the_schedule() -> None:
    scripts = [[1.0] * 12 + [0.5] * 11 + [1.0] * 7, [0.2] * 6 + [1.0] * 5 + [0.3] * 5 + [1.0] * 14]
    cost = inversion.DynamicCost(2, (1, 2, 2), torch.Generator().manual_seed(0), device=torch.device("cpu"), patience=5)
    seen = []
    for step in range(30):
        cost.update(torch.tensor([scripts[0][step], scripts[1][step]]), torch.tensor([4.0 - step * 0.01] * 2))
        seen.append(cost.cost.clone())
    found = torch.stack(seen)
    for label, script in enumerate(scripts):
        assert found[:, label].tolist() == pytest.approx(reference_costs(script, 0.99, 1e-3, 5, 2.0), rel=1e-6)
    assert found[9, 0] == pytest.approx(2e-3, rel=1e-6)  # five successes set it, five more double it
    assert found[16, 0] == pytest.approx(2e-3 / 2**1.5, rel=1e-6)


def test_dynamic_cost_stops_when_the_mask_no_longer_shrinks() -> None:
    cost = inversion.DynamicCost(1, (1, 2, 2), torch.Generator(), device=torch.device("cpu"), patience=1, stop_patience=3)
    finished = []
    for accuracy in [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]:
        finished.append(bool(cost.update(torch.tensor([accuracy]), torch.tensor([2.0]))))
    assert finished[-1] and not finished[2]


@pytest.mark.parametrize(("tolerance", "ends"), [(0.1, 7), (0.0, None)])
def test_with_a_tolerance_a_mask_that_hardly_shrinks_is_done(tolerance: float, ends: int | None) -> None:
    # The cost only rises; of 100, 95, 85, 84, 83, … with a tolerance of a tenth 85 is the last smaller one.
    cost = inversion.DynamicCost(1, (1, 2, 2), torch.Generator(), device=torch.device("cpu"), patience=1, tolerance=tolerance, stop_patience=4)
    norms = [100.0, 95.0, 85.0, *(84.0 - step for step in range(8))]
    finished = [bool(cost.update(torch.tensor([1.0]), torch.tensor([norm]))) for norm in norms]
    assert (finished.index(True) + 1 if ends else any(finished)) == (ends or False)


def sequential(
    model: Classifier, data: ImageSet, label: int, mask: torch.Tensor, pattern: torch.Tensor, passes: int, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """MCLDef's stage 1 for one label, as plainly as possible."""
    mask, pattern = mask.clone().requires_grad_(), pattern.clone().requires_grad_()
    optimizer = torch.optim.Adam([mask, pattern], lr=0.005)
    generator = Run(seed=3).generator("all")
    for _ in range(passes):
        for chosen in torch.randperm(len(data), generator=generator).split(4):
            images = data.images[chosen].float() / 255
            logits = model((1 - mask) * images + mask * pattern)
            loss = F.cross_entropy(logits, torch.full((len(images),), label)) + weight * mask.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
                pattern.clamp_(0, 1)
    return mask.detach(), pattern.detach()


@pytest.mark.parametrize("values", [VALUES, 2 * 4 * 3 * 8 * 8])
def test_all_labels_at_once_equal_one_at_a_time(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.images.VALUES", values)
    monkeypatch.setattr(inversion, "mixed_precision", lambda *a, **k: contextlib.nullcontext())
    model, data = tiny().requires_grad_(False), some_images()
    start = inversion.FixedCost(3, (3, 8, 8), torch.Generator().manual_seed(5), weight=0.01, patience=99, scale=torch.ones(3), offset=torch.zeros(3))
    first = {name: value.detach().clone() for name, value in start.state().items()}
    found = inversion.invert(Run(seed=3), "all", classifier=model, clean=data, labels=[0, 1, 2], objective=start, passes=3, batch_size=4)
    for label in range(3):
        mask, pattern = sequential(model, data, label, first["mask"][label], first["pattern"][label], 3, 0.01)
        assert torch.allclose(found.masks[label], mask, atol=1e-5)
        assert torch.allclose(found.patterns[label], pattern, atol=1e-5)


@pytest.mark.parametrize(
    ("tolerance", "ends"),
    # Of 100, 94, 93, 92, 91, 90, 95, 95, 95, 95: with a tolerance 94 is the last smaller norm, without it 90.
    [(0.05, 5), (0.0, 9)],
)
def test_inversion_ends_when_the_mask_hardly_shrinks(tolerance: float, ends: int) -> None:
    objective = inversion.FixedCost(2, (3, 8, 8), torch.Generator(), weight=0.01, patience=2, tolerance=tolerance, scale=torch.ones(3), offset=torch.zeros(3))
    slow, steady = [100, 94, 93, 92, 91, 90, 95, 95, 95, 95], [100 * 0.9**step for step in range(10)]
    finished = [objective.update(torch.ones(2), torch.tensor(norms)).tolist() for norms in zip(slow, steady, strict=True)]
    assert [first for first, _ in finished].index(True) + 1 == ends
    assert not any(second for _, second in finished)


def test_finished_labels_keep_their_trigger() -> None:
    model, data = tiny(), some_images()

    class Stops(inversion.FixedCost):
        def update(self, success: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "first"):
                self.first = self.result()
            return torch.tensor([True, False, False])

    objective = Stops(3, (3, 8, 8), torch.Generator(), weight=0.01, patience=9, scale=torch.ones(3), offset=torch.zeros(3))
    found = inversion.invert(Run(), "all", classifier=model, clean=data, labels=[0, 1, 2], objective=objective, passes=3, batch_size=4)
    assert torch.equal(found.masks[0], objective.first[0][0])
    assert not torch.equal(found.masks[1], objective.first[0][1])


def test_a_pattern_clipped_after_normalisation_is_an_affine_pixel_pattern() -> None:
    from core.recovery import pattern_space

    model = tiny()
    scale, offset = pattern_space(model, "normalized_clip01")
    mask, free, images = torch.rand(8, 8), torch.rand(3, 8, 8), torch.rand(2, 3, 8, 8)
    pixel = inversion.stamp(images, mask, offset[:, None, None] + scale[:, None, None] * free)
    assert torch.allclose(model.normalise(pixel), (1 - mask) * model.normalise(images) + mask * free, atol=1e-5)

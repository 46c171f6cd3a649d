from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from core.losses import model_contrastive


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

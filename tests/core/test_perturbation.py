"""Universal perturbations, and what they say about a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from core.catalog import Inputs
from core.classifier import Classifier
from core.defenses.inspect import pt_red
from core.errors import EngineError
from core.images import ImageSet, as_floats
from core.perturbation import smallest_perturbations
from core.run import Run
from tests.core.untrained import tiny

CLASSES, SIZE = 6, 8


class Linear(Classifier):
    """Logits that rise along one direction each; where a class's is steep, a short way leads there."""

    def __init__(self, steep: dict[int, float]) -> None:
        like = tiny(CLASSES, SIZE)
        super().__init__(like.network, like.architecture, like.preprocessing)
        directions = torch.linalg.qr(torch.randn(3 * SIZE**2, CLASSES, generator=torch.Generator().manual_seed(2))).Q.T
        self.register_buffer("directions", directions * torch.tensor([steep.get(label, 1.0) for label in range(CLASSES)])[:, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.normalise(images).flatten(1) @ self.directions.T


def some(count: int = 60) -> ImageSet:
    pixels = torch.randint(60, 196, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return ImageSet(pixels)


def examined(model: Classifier, images: ImageSet, **params: Any) -> dict[str, Any]:
    return pt_red.run(Run(seed=3, device="cpu"), Inputs(model=model, clean=images), pt_red.PTRED(method="pt_red", batch_size=16, **params)).findings


def test_all_classes_at_once_equal_one_after_the_other() -> None:
    model, run = Linear({1: 3.0}), Run(seed=3, device="cpu")
    found = smallest_perturbations(run, "perturb", model, some(), success=0.9, step=0.005, steps=60, batch_size=16)
    images = as_floats(some().images)
    for label in range(CLASSES):
        generator = run.generator("perturb")
        drawn = images[torch.randperm(60, generator=generator)]
        others = drawn[model(drawn).argmax(1) != label]
        perturbation, share = torch.zeros(3, SIZE, SIZE), 0.0
        for _ in range(60):
            batch = drawn[torch.randperm(60, generator=generator)[:16]]
            perturbation.requires_grad_(True)
            logits = model((batch + perturbation).clamp(0, 1))
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, torch.full((16,), label)), perturbation)
            perturbation = perturbation.detach() - 0.005 * (3 * SIZE**2) ** 0.5 * slope / slope.norm()
            if (logits.argmax(1) == label).float().mean() >= 0.9:
                share = float((model((others + perturbation).clamp(0, 1)).argmax(1) == label).float().mean())
                if share >= 0.9:
                    break
        assert share >= 0.9
        assert found.success[label] == pytest.approx(share, abs=0.05)
        assert found.norms[label] == pytest.approx(float(perturbation.norm()), rel=0.1)
        assert F.cosine_similarity(found.images[label].flatten(), perturbation.flatten(), dim=0) > 0.98


def test_a_class_that_is_too_near_is_called_a_backdoor() -> None:
    found = examined(Linear({4: 8.0}), some())
    assert (found["verdict"], found["target"]) == ("backdoored", 4) and found["p_value"] < 0.01
    assert found["norms"][4] == min(found["norms"]) and min(found["success"]) >= 0.95
    ordinary = examined(Linear({}), some())
    assert ordinary["verdict"] == "no_evidence" and ordinary["target"] is None


def test_a_class_out_of_reach_is_not_called_clean() -> None:
    found = examined(Linear({}), some(), steps=1)
    assert found["verdict"] == "not_fully_examined" and "raise `steps`" in found["reason"]
    # No slope leads anywhere.
    flat = Linear(dict.fromkeys(range(CLASSES), 0.0))
    assert examined(flat, some(), steps=5)["verdict"] == "not_fully_examined"
    few = Inputs(model=flat, clean=some(8))
    with pytest.raises(EngineError, match="8 clean images"):
        pt_red.run(Run(device="cpu"), few, pt_red.PTRED(method="pt_red"))

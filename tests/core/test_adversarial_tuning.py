"""The methods that tune against perturbed images or weights: CBD, SAU, NPD, I-BAU, FT-SAM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.catalog import Inputs
from core.defenses.purify.cbd import CBD, adversarial_view
from core.defenses.purify.ft_sam import AdaptiveSam
from core.defenses.purify.ibau import implicit_gradient
from core.defenses.purify.npd import Polarizer
from core.defenses.purify.sau import SAU, shared_adversarial
from core.errors import LabelsMissing
from core.images import ImageSet
from core.losses import info_nce
from tests.core.untrained import model, noise, run_method, state


def test_implicit_gradient_equals_the_unrolled_fixed_point() -> None:
    weights = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    delta = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)

    def phi(delta: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return 0.3 * torch.sin(delta * weights) + 0.1 * weights.square()

    def outer(delta: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (delta * weights + delta.square()).sum()

    for steps in (1, 3, 5):
        (found,) = implicit_gradient(outer(delta, weights), phi(delta, weights), delta, [weights], steps)
        # K terms of the Neumann series of (I - dPhi/ddelta)^-T, from the Jacobians.
        on_delta, on_weights = torch.autograd.functional.jacobian(phi, (delta, weights))
        direct_delta, direct = torch.autograd.functional.jacobian(outer, (delta, weights))
        v = sum(torch.linalg.matrix_power(on_delta.T, k) @ direct_delta for k in range(steps))
        assert torch.allclose(found, direct + on_weights.T @ v)


def test_adaptive_sam_moves_as_its_formula_says() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = AdaptiveSam(iter([weight]), lr=0.1, rho=0.5)
    before = weight.detach().clone()

    def loss() -> torch.Tensor:
        return (weight**4).sum()

    slope = 4 * before**3
    optimizer.ascend(torch.autograd.grad(loss(), optimizer.weights))
    moved = before + 0.5 * before**2 * slope / (before.abs() * slope).norm()
    assert torch.allclose(weight, moved)
    loss().backward()
    optimizer.step()
    assert torch.allclose(weight, before - 0.1 * 4 * moved**3)


@pytest.mark.parametrize(("bound", "norm", "most"), [({}, float("inf"), 8 / 255), ({"l2": 2.0, "step": 0.5}, 2, 2.0)])
def test_adversarial_views_stay_close_and_fit_worse(bound: dict[str, Any], norm: float, most: float) -> None:
    classifier, params = model(), CBD(method="cbd", steps=5, **bound)
    images, anchors = torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32)
    before = state(classifier.train())
    moved = adversarial_view(classifier, images, anchors, params)
    assert classifier.training and all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    far = (moved - images).flatten(1).norm(norm, dim=1)
    assert far.max() <= most + 1e-5 and far.min() > most / 2 and moved.min() >= 0 and moved.max() <= 1
    classifier.eval()
    with torch.no_grad():
        wanted = classifier.features(anchors)
        assert info_nce(classifier.features(moved), wanted, temperature=0.5) > info_nce(classifier.features(images), wanted, temperature=0.5)


def test_cbd_touches_no_label() -> None:
    data = noise(40)
    assert data.labels is not None
    params = {"epochs": 1, "steps": 1, "batch_size": 20}
    purified = [
        state(run_method("cbd", params, Inputs(model=model(), clean=ImageSet(data.images, labels))))
        for labels in (data.labels, data.labels[torch.randperm(40)], None)
    ]
    assert all(torch.equal(purified[0][name], other[name]) for other in purified[1:] for name in purified[0])
    # An adapted head predicts what the suspect model does; a kept one no longer quite does.
    images = data.images.float() / 255
    kept, adapted = (run_method("cbd", {**params, "head": head, "learning_rate": 0.2}, Inputs(model=model(), clean=data)) for head in ("keep", "adapt"))
    with torch.no_grad():
        wanted = model()(images).softmax(1)
        assert F.cross_entropy(adapted(images), wanted) < F.cross_entropy(kept(images), wanted)
    with pytest.raises(LabelsMissing):
        run_method("cbd", {**params, "head": "probe"}, Inputs(model=model(), clean=ImageSet(data.images)))


def test_shared_examples_are_within_their_bound() -> None:
    classifier = model()
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6)
    params = SAU(method="sau", steps=2)
    moved = shared_adversarial(classifier, classifier.frozen_copy(), images, labels, params)
    assert (moved - images).abs().max() <= params.epsilon + 1e-6 and moved.min() >= 0 and moved.max() <= 1


def test_the_polarizer_folds_into_the_convolution() -> None:
    conv, images = nn.Conv2d(3, 4, 3, padding=1), torch.rand(2, 3, 6, 6)
    layer = Polarizer(3)
    with torch.no_grad():
        layer.map.copy_(torch.randn(3, 3))
        mapped = torch.einsum("ij,njhw->nihw", layer.map, images)
        assert torch.allclose(F.conv2d(images, layer(conv.weight), conv.bias, padding=1), conv(mapped), atol=1e-5)


def test_npd_changes_one_weight_and_keeps_the_names() -> None:
    before = model()
    data = ImageSet(noise(40).images, torch.arange(40) % 10)
    after = run_method("npd", {"epochs": 1, "warm_epochs": 1, "learning_rate": 0.1, "epoch_images": 0}, Inputs(model=before, clean=data)).state_dict()
    assert list(after) == list(before.state_dict())
    assert [name for name, value in before.state_dict().items() if not torch.equal(value, after[name])] == ["network.block3.layer.0.conv1.weight"]

"""The methods that silence channels, each score against a slow form of its equation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from core import pruning, sparing
from core.defenses.purify.bnp import divergence
from core.defenses.purify.clp import lipschitz
from core.defenses.purify.fine_pruning import FinePruning, _prune
from core.errors import NothingLeft
from core.evaluation import predict
from tests.core.untrained import model, noise


@pytest.mark.parametrize("name", ["wrn-10-1", "preactresnet18", "resnet18-cifar", "vgg11-bn-cifar", "mobilenet-v2-cifar"])
def test_pairs_are_found_by_what_flows(name: str) -> None:
    classifier = model(name)
    pairs = pruning.fed_by_convolutions(classifier, torch.rand(1, 3, 32, 32))
    layers = pruning.batch_norms(classifier)
    assert pairs and all(conv.out_channels == layers[one].num_features for one, conv in pairs.items())
    # What a pruned channel of a paired BatchNorm gets is that convolution's output: silencing both ends is the same.
    one, conv = next(iter(pairs.items()))
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        conv.weight[0] = 0
        if conv.bias is not None:
            conv.bias[0] = 0
        layers[one].running_mean[0] = 0  # type: ignore[index]
        without = classifier(images)
        layers[one].weight[0] = 0
        assert torch.allclose(classifier(images), without, atol=1e-6)


def test_lipschitz_is_the_largest_singular_value() -> None:
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    bn.running_var = torch.tensor([1.0, 4.0, 0.25, 9.0])
    nn.init.uniform_(bn.weight, -2, 2)
    gamma = bn.weight.detach()
    for k, found in enumerate(lipschitz(conv.weight, bn).tolist()):
        kernel = conv.weight[k].reshape(3, 9).detach().double()
        largest = math.sqrt(float(torch.linalg.eigvalsh(kernel @ kernel.T)[-1]))
        assert found == pytest.approx(largest * abs(float(gamma[k])) / math.sqrt(float(bn.running_var[k]) + bn.eps), rel=1e-5)


def test_divergence_is_kullback_leiblers() -> None:
    bn = nn.BatchNorm2d(3)
    bn.running_mean, bn.running_var = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([1.0, 2.0, 0.5])
    mean, variance = torch.tensor([0.5, 1.0, 0.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, (variance + bn.eps).sqrt()), normal(bn.running_mean.double(), (bn.running_var.double() + bn.eps).sqrt())
    )
    assert torch.allclose(divergence(mean, variance, bn), expected)


def test_pruning_keeps_the_bias_only_when_told() -> None:
    for bias in (False, True):
        classifier = model()
        layers = pruning.batch_norms(classifier)
        first = next(iter(layers))
        which = torch.zeros(layers[first].num_features, dtype=torch.bool)
        which[1] = True
        was = float(layers[first].bias[1].detach())
        found = pruning.remove(classifier, {first: which}, bias=bias)
        assert layers[first].weight[1] == 0 and float(layers[first].bias[1].detach()) == (0 if bias else was) and found["pruned"] == 1
        with pytest.raises(NothingLeft):
            pruning.remove(classifier, {first: torch.ones_like(which)}, bias=bias)


def test_pruning_is_sparing_of_what_the_predictions_rest_on() -> None:
    classifier = model()
    images = noise(60).images
    before = predict(classifier, images)
    generator = torch.Generator().manual_seed(1)
    suspicion = {name: torch.rand(layer.num_features, generator=generator) for name, layer in pruning.batch_norms(classifier).items()}
    ranked = sorted(((float(value), name, index) for name, values in suspicion.items() for index, value in enumerate(values)), reverse=True)
    with pytest.raises(NothingLeft):
        sparing.remove(classifier.frozen_copy(), suspicion, images, least=0, agreement=0)
    spared = classifier.frozen_copy()
    found = sparing.remove(spared, suspicion, images, least=0, agreement=0.9)
    assert found["pruned"] + found["spared"] == found["channels"] and found["pruned"] > 0
    assert float((predict(spared, images) == before).float().mean()) >= 0.9
    # The most suspicious went, and one more would have been one too many.
    gone = {(name, int(index)) for name, layer in pruning.batch_norms(spared).items() for index in (layer.weight == 0).nonzero().squeeze(1)}
    assert gone == {(name, index) for _, name, index in ranked[: found["pruned"]]}
    layers = pruning.batch_norms(spared)
    _, name, index = ranked[found["pruned"]]
    with torch.no_grad():
        layers[name].weight[index] = 0
    assert float((predict(spared, images) == before).float().mean()) < 0.9
    # What is not suspicious stays, whatever it would cost.
    few = sparing.remove(classifier.frozen_copy(), suspicion, images, least=ranked[2][0], agreement=0)
    assert few["pruned"] == 3 and few["spared"] == 0


def test_masks_of_one_change_nothing_and_noise_is_relative() -> None:
    classifier = model()
    images = torch.rand(4, 3, 32, 32)
    masks = pruning.ChannelMasks(classifier)
    assert torch.allclose(masks.logits(images), classifier(images), atol=1e-6)
    noise_ = {name: (torch.full_like(value, 0.25), torch.full_like(value, -0.5)) for name, value in masks.values.items()}
    scaled = classifier.frozen_copy()
    with torch.no_grad():
        for layer in pruning.batch_norms(scaled).values():
            layer.weight.mul_(1.25)
            layer.bias.mul_(0.5)
    assert torch.allclose(masks.logits(images, noise_), scaled(images), atol=1e-5)
    masks.logits(images).sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in masks.values.values())


def test_fine_pruning_stops_before_accuracy_falls() -> None:
    head = nn.Linear(4, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[5.0, 0.0, 0.0, 0.0], [-5.0, 0.0, 0.0, 0.0]]))
        head.bias.zero_()
    features = torch.tensor([[1.0, 0.1, 0.2, 0.3], [-1.0, 0.1, 0.2, 0.3]]).repeat(10, 1)
    kept, accuracies = _prune(features, head, torch.tensor([0, 1]).repeat(10), FinePruning(method="fine_pruning", step=0.25))
    # The first channel is the quietest on average and the only one that matters.
    assert kept.tolist() == [True] * 4 and accuracies == [1.0]

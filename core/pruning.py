"""BatchNorm channels: masks on them, which convolution feeds which, and taking channels out."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.classifier import Classifier
from core.errors import LayerMissing, NothingLeft


def batch_norms(classifier: Classifier) -> dict[str, nn.BatchNorm2d]:
    """Return the affine BatchNorm layers by name; raises `LayerMissing` when there are none."""
    found = {name: module for name, module in classifier.named_modules() if isinstance(module, nn.BatchNorm2d) and module.affine}
    if not found:
        raise LayerMissing(
            f"{classifier.architecture.name} has no BatchNorm layers, which this method works on", "Choose a method that needs none, such as ft_sam or mcldef."
        )
    return found


def fed_by_convolutions(classifier: Classifier, images: torch.Tensor) -> dict[str, nn.Conv2d]:
    """Return for each BatchNorm's name the convolution whose output is its input, found by running `images` through the model.

    A BatchNorm behind a sum (of pre-activation networks) or a concatenation has none and is left out. Names say nothing of it: modules
    are not always declared in the order they run.
    """
    outputs: list[tuple[nn.Conv2d, torch.Tensor]] = []
    pairs: dict[str, nn.Conv2d] = {}
    hooks = []
    for name, module in classifier.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda conv, args, output: outputs.append((conv, output))))
        elif isinstance(module, nn.BatchNorm2d):

            def seen(bn: nn.Module, args: Any, name: str = name) -> None:
                feeding = [conv for conv, output in outputs if output is args[0]]
                if feeding:
                    pairs[name] = feeding[0]

            hooks.append(module.register_forward_pre_hook(seen))
    try:
        with torch.no_grad():
            was_training = classifier.training
            classifier.eval()(images)
            classifier.train(was_training)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs


class ChannelMasks:
    """A factor in [0, 1] for the weight of every BatchNorm channel, learnt while the weights stay.

    Attributes:
        values: by layer name, (channels,) float32, 1 at first.
    """

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._layers = batch_norms(classifier)
        self.values = {name: torch.ones_like(layer.weight).requires_grad_(True) for name, layer in self._layers.items()}

    def logits(self, images: torch.Tensor, noise: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None) -> torch.Tensor:
        """Return f(images) with weight * (mask + dn) and bias * (1 + db) in every BatchNorm, in the classifier's mode.

        Args:
            noise: by layer name, (dn, db) of (channels,) each.
        """
        for name, layer in self._layers.items():
            on_weight, on_bias = noise[name] if noise else (0.0, 0.0)
            weight, bias = layer.weight.detach() * (self.values[name] + on_weight), layer.bias.detach() * (1 + on_bias)
            # On the object, not through torch.func: that goes by attribute names, and a network's `features` is a method here.
            layer.forward = functools.partial(_normalise, layer, weight, bias)  # type: ignore[method-assign]
        try:
            output: torch.Tensor = self._classifier(images)
            return output
        finally:
            for layer in self._layers.values():
                del layer.forward

    def clip(self) -> None:
        """Bring the masks back into [0, 1]."""
        with torch.no_grad():
            for value in self.values.values():
                value.clamp_(0, 1)


def _normalise(layer: nn.BatchNorm2d, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Do what the layer does, with another weight and bias."""
    momentum = 0.0 if layer.momentum is None else layer.momentum
    return F.batch_norm(x, layer.running_mean, layer.running_var, weight, bias, layer.training, momentum, layer.eps)


def remove(classifier: Classifier, chosen: dict[str, torch.Tensor], *, bias: bool) -> dict[str, Any]:
    """Take BatchNorm channels out of `classifier` in place: their weight becomes 0, and with `bias` their bias too.

    Args:
        chosen: by layer name, (channels,) bool.

    Returns counts for the report. Raises `NothingLeft` when a layer would lose every channel.
    """
    layers = batch_norms(classifier)
    for name, which in chosen.items():
        if bool(which.all()):
            raise NothingLeft(f"every channel of {name} would be pruned", "Use a threshold that prunes less.")
        with torch.no_grad():
            layers[name].weight[which] = 0
            if bias:
                layers[name].bias[which] = 0
    pruned = {name: int(which.sum()) for name, which in chosen.items() if which.any()}
    return {"pruned": sum(pruned.values()), "channels": sum(layer.num_features for layer in layers.values()), "pruned_by_layer": pruned}

"""A frozen classifier through which gradients go to images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from core.classifier import Classifier


def transparent(classifier: Classifier) -> Classifier:
    """Return a frozen copy whose backward pass, to its images only, costs less than `frozen_copy`'s; its outputs are the same.

    In eval mode BatchNorm is one factor a channel, but torch's backward pass works out everything that training would need: with WRN-16-1 that
    was a fifth of a step. Gradients of gradients are refused. Under autocast the factor is rounded as the gradient is.
    """
    copy = classifier.frozen_copy()
    for parent in list(copy.modules()):
        for name, module in parent.named_children():
            # A subclass may do more than normalise.
            if type(module) is nn.BatchNorm2d and module.running_var is not None:
                parent.register_module(name, _Frozen(module))
    return copy


class _Frozen(nn.Module):
    """A BatchNorm in eval mode, for good."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.layer = layer
        assert layer.running_var is not None
        scale = (layer.running_var + layer.eps).rsqrt()
        self.scale = (scale if layer.weight is None else scale * layer.weight.detach())[None, :, None, None]

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Normalise.apply(maps, self.layer, self.scale)
        return found


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: torch.Tensor, layer: nn.BatchNorm2d, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scale)
        return torch.batch_norm(maps, layer.weight, layer.bias, layer.running_mean, layer.running_var, False, 0.0, layer.eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return slope * scale.to(slope.dtype), None, None

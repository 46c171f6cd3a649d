"""A small U-Net that paints on images, for the attacks whose trigger is a network.

It is trained in whatever precision is fast and applied in double precision, where the last bits of a sum do not decide how
a pixel is rounded: the same network paints the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn


def block(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Return convolution, group normalisation and ReLU."""
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, stride, 1), nn.GroupNorm(4, channels), nn.ReLU())


class UNet(nn.Module):
    """Two levels of 3x3 convolutions with skip connections: (N, channels_in, H, W) to (N, channels_out, H, W), unbounded."""

    def __init__(self, channels_in: int, channels_out: int, width: int = 16) -> None:
        super().__init__()
        self.first = block(channels_in, width)
        self.down = block(width, 2 * width, 2)
        self.deep = block(2 * width, 2 * width, 2)
        self.middle = block(4 * width, 2 * width)
        self.last = block(3 * width, width)
        self.out = nn.Conv2d(width, channels_out, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Paint."""
        first = self.first(x)
        down = self.down(first)
        middle = self.middle(torch.cat((F.interpolate(self.deep(down), size=down.shape[2:]), down), dim=1))
        return self.out(self.last(torch.cat((F.interpolate(middle, size=first.shape[2:]), first), dim=1)))


def to_assets(network: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Return a network's weights under `prefix.`, as float32 on the CPU."""
    return {f"{prefix}.{name}": value.detach().float().cpu().contiguous() for name, value in network.state_dict().items()}


def from_assets(network: nn.Module, assets: Mapping[str, torch.Tensor], prefix: str) -> nn.Module:
    """Fill a fresh network with the weights under `prefix.` and make it double."""
    network.load_state_dict({name.removeprefix(f"{prefix}."): value for name, value in assets.items() if name.startswith(f"{prefix}.")})
    return network.double().eval().requires_grad_(False)

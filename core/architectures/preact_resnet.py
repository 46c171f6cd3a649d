"""Pre-activation ResNets (He et al., ECCV 2016) in the form of kuangliu, WaNet and BackdoorBench: no BatchNorm after the last block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.architectures.network import Network
from core.architectures.recognise import Architecture, Shapes, count_blocks

FAMILY = "preact_resnet"
LENGTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
NAMES = {f"preactresnet{depth}": {"depth": depth} for depth in LENGTHS}


class Block(nn.Module):
    """Pre-activation block; a projecting shortcut reads the activated input."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, channels_in, H, W) to (N, channels, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x))
        shortcut = self.shortcut(activated) if hasattr(self, "shortcut") else x
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))


class PreActResNet(Network):
    """Features are signed: nothing follows the last sum."""

    head_name = "linear"

    def __init__(self, *, depth: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        width = 64
        for index, count in enumerate(LENGTHS[depth]):
            blocks = []
            for number in range(count):
                wider = 64 * 2**index
                blocks.append(Block(width, wider, 2 if index and not number else 1))
                width = wider
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(width, classes)

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the four layers' outputs."""
        x, maps = self.conv1(images), []
        for layer in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{layer}")(x)
            maps.append(x)
        return maps


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the network these shapes belong to, if they do."""
    stem, head = shapes.get("conv1.weight"), shapes.get("linear.weight")
    if stem is None or head is None or "bn1.weight" in shapes or "layer1.0.bn1.weight" not in shapes or "layer1.0.conv3.weight" in shapes:
        return []
    lengths = tuple(count_blocks(shapes, f"layer{layer}.") for layer in (1, 2, 3, 4))
    return [describe(depth=depth, classes=head[0], channels=stem[1]) for depth, known in LENGTHS.items() if known == lengths]


def describe(*, depth: int, classes: int, channels: int) -> Architecture:
    """Return the architecture of a depth."""
    options = {"depth": depth, "classes": classes, "channels": channels}
    return Architecture(family=FAMILY, name=f"preactresnet{depth}", options=options, classes=classes, channels=channels, input_size=32)


def build(options: dict[str, Any]) -> PreActResNet:
    """Build the network that `variants` described."""
    return PreActResNet(**options)

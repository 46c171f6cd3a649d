"""Wide residual networks in the form of the NAD, ABL and MCL code: WRN-d-k (Zagoruyko & Komodakis, BMVC 2016)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from core.architectures.network import Network
from core.architectures.recognise import Architecture, Shapes, count_blocks

FAMILY = "wide_resnet"
NAMES = {f"wrn-{depth}-{width}": {"depth": depth, "width": width} for depth, width in ((10, 1), (10, 2), (16, 1), (16, 2), (28, 10), (40, 1), (40, 2))}


class Block(nn.Module):
    """Pre-activation block; where channels change, both branches read the activated input."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        if channels_in != channels:
            self.convShortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, channels_in, H, W) to (N, channels, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = self.convShortcut(activated) if hasattr(self, "convShortcut") else x
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))


class Group(nn.Module):
    """`count` blocks of equal width; only the first one changes size."""

    def __init__(self, count: int, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        blocks = [Block(channels_in if index == 0 else channels, channels, stride if index == 0 else 1) for index in range(count)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks."""
        return self.layer(x)


class WideResNet(Network):
    """WRN-depth-width; features are non-negative, 64 * width of them."""

    def __init__(self, *, depth: int, width: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        if (depth - 4) % 6 or depth < 10:
            raise ValueError(f"a wide ResNet's depth is 6n + 4, not {depth}")
        count = (depth - 4) // 6
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.block1 = Group(count, widths[0], widths[1], 1)
        self.block2 = Group(count, widths[1], widths[2], 2)
        self.block3 = Group(count, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the three groups' outputs, before the final BatchNorm."""
        first = self.block1(self.conv1(images))
        second = self.block2(first)
        return [first, second, self.block3(second)]

    def pool(self, last: torch.Tensor) -> torch.Tensor:
        """Final BatchNorm, ReLU and average pool."""
        return F.relu(self.bn1(last), inplace=True).mean((2, 3))


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the wide ResNet these shapes belong to, if they do."""
    first = shapes.get("block1.layer.0.conv1.weight")
    stem = shapes.get("conv1.weight")
    head = shapes.get("fc.weight")
    if first is None or stem is None or head is None or "conv1.bias" in shapes or len(first) != 4 or len(stem) != 4:
        return []
    return [describe(depth=6 * count_blocks(shapes, "block1.layer.") + 4, width=max(first[0] // 16, 1), classes=head[0], channels=stem[1])]


def describe(*, depth: int, width: int, classes: int, channels: int) -> Architecture:
    """Return the architecture of a depth and width."""
    options = {"depth": depth, "width": width, "classes": classes, "channels": channels}
    return Architecture(family=FAMILY, name=f"wrn-{depth}-{width}", options=options, classes=classes, channels=channels, input_size=32)


def build(options: dict[str, int]) -> WideResNet:
    """Build the network that `variants` described."""
    return WideResNet(**options)

"""ResNet-34 in the form of the Trap-and-Replace code, with the replaced head beside the trap's.

The stem ends after convolution 29, 31 or 33 (after the first, second or third block of `layer4`); the new head is what
follows of `layer4_aux`, then `fc_aux`. Which of the three it was is in no tensor's shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from core.architectures import resnet
from core.architectures.network import Network
from core.architectures.recognise import Architecture, Shapes

FAMILY = "trap_replace_resnet"
# The code's README uses 31.
STEMS = (31, 29, 33)
NAMES = {f"resnet34-replaced-{stem}": {"stem_end": stem} for stem in STEMS}


class ReplacedResNet(Network):
    """Stem, new head; the trap's head keeps its weights and is not used."""

    head_name = "fc_aux"

    def __init__(self, *, stem_end: int, classes: int, channels: int) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        for name, module in resnet.ResNet(depth=34, classes=classes, channels=channels, stem="imagenet").named_children():
            self.add_module(name, module)
        # The first block expects the stem's 512 channels already, so only those after it can follow a shorter stem.
        shortcut = nn.Sequential(nn.Conv2d(512, 512, 1, bias=False), nn.BatchNorm2d(512))
        self.layer4_aux = nn.Sequential(BasicBlock(512, 512, downsample=shortcut), BasicBlock(512, 512), BasicBlock(512, 512))
        self.fc_aux = nn.Linear(512, classes)
        self.kept = (stem_end - 27) // 2

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the four layers' outputs."""
        x = images
        for name in ("conv1", "bn1", "relu", "maxpool"):
            x = self.get_submodule(name)(x)
        maps = []
        for layer in (1, 2, 3):
            x = self.get_submodule(f"layer{layer}")(x)
            maps.append(x)
        for number in range(3):
            x = self.get_submodule(f"layer4.{number}" if number < self.kept else f"layer4_aux.{number}")(x)
        return [*maps, x]


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the three networks these shapes can be, if they are of this family."""
    stem, head = shapes.get("conv1.weight"), shapes.get("fc_aux.weight")
    if stem is None or head is None or "layer4_aux.1.conv1.weight" not in shapes or any(name.startswith("decoder") for name in shapes):
        return []
    return [describe(stem_end=stem_end, classes=head[0], channels=stem[1]) for stem_end in STEMS]


def describe(*, stem_end: int, classes: int, channels: int) -> Architecture:
    """Return the architecture with a stem."""
    return Architecture(
        family=FAMILY,
        name=f"resnet34-replaced-{stem_end}",
        options={"stem_end": stem_end, "classes": classes, "channels": channels},
        classes=classes,
        channels=channels,
        input_size=224,
    )


def build(options: dict[str, Any]) -> ReplacedResNet:
    """Build the network that `variants` described."""
    return ReplacedResNet(**options)

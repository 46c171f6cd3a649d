"""ResNets in the form of the SupContrast code: an `encoder` with a projection head, or with a linear classifier.

With the projection the outputs are an embedding, not classes; defenses of self-supervised backbones work on it as a classifier with a new
head (`core/probe.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from core.architectures import resnet
from core.architectures.network import Network
from core.architectures.recognise import Architecture, Shapes

FAMILY = "supcontrast"
NAMES = {f"resnet{depth}-supcontrast": {"depth": depth} for depth in (18, 34, 50)}

# Theirs to ours: `head` is the last linear layer here.
RENAMES = ((".shortcut.", ".downsample."), ("head.", "projection."))


class SupContrast(Network):
    """Encoder, hidden layer, projection."""

    head_name = "projection.2"

    def __init__(self, *, depth: int, classes: int, channels: int) -> None:
        super().__init__()
        self.encoder = resnet.ResNet(depth=depth, classes=classes, channels=channels, stem="cifar")
        width = self.encoder.head.in_features
        del self.encoder.fc
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the four layers' outputs."""
        return self.encoder.stages(images)

    def pool(self, last: torch.Tensor) -> torch.Tensor:
        """Average pool and hidden layer."""
        return self.projection[:2](last.mean((2, 3)))


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the network these shapes belong to, if they do."""
    inner = {name.removeprefix("encoder."): shape for name, shape in shapes.items() if name.startswith("encoder.")}
    rest = {name: shape for name, shape in shapes.items() if not name.startswith("encoder.")}
    if not inner or "conv1.weight" not in inner:
        return []
    if set(rest) == {"fc.weight", "fc.bias"}:
        # An ordinary classifier whose body has a prefix of its own.
        children = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
        renames = tuple((f"encoder.{child}", child) for child in children)
        return [Architecture(**{**vars(found), "renames": (*renames, *found.renames)}) for found in resnet.variants({**inner, **rest})]
    last = rest.get("head.2.weight")
    if last is None or set(rest) != {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}:
        return []
    found = resnet.variants({**inner, "linear.weight": last, "linear.bias": last[:1]})
    return [describe(depth=one.options["depth"], classes=last[0], channels=one.channels) for one in found if one.options["stem"] == "cifar"]


def describe(*, depth: int, classes: int, channels: int) -> Architecture:
    """Return the architecture of a depth; `classes` is the embedding's length."""
    return Architecture(
        family=FAMILY,
        name=f"resnet{depth}-supcontrast",
        options={"depth": depth, "classes": classes, "channels": channels},
        classes=classes,
        channels=channels,
        input_size=32,
        renames=RENAMES,
        embedding=True,
    )


def build(options: dict[str, Any]) -> SupContrast:
    """Build the network that `variants` described."""
    return SupContrast(**options)

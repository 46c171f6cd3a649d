"""ResNet-18/34/50 (He et al., CVPR 2016) in torchvision's form and with the two CIFAR stems.

Checkpoints name the same layers in two ways: `downsample`/`fc` (torchvision and its CIFAR forks) and
`shortcut`/`linear` (the kuangliu lineage); the layers are built once, the names are translated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from core.architectures.network import Network
from core.architectures.recognise import Architecture, Shapes, count_blocks

FAMILY = "resnet"
NAMES = {
    f"resnet{depth}{suffix}": {"depth": depth, "stem": stem}
    for depth in (18, 34, 50)
    for stem, suffix in (("imagenet", ""), ("cifar", "-cifar"), ("cifar-maxpool", "-cifar-maxpool"))
}
DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34, ((3, 4, 6, 3), True): 50}


class ResNet(Network):
    """A ResNet whose stem is `imagenet` (7x7, max-pool), `cifar` (3x3) or `cifar-maxpool` (3x3, max-pool)."""

    def __init__(self, *, depth: int, classes: int, channels: int, stem: str) -> None:
        super().__init__()
        # torchvision costs half a second to import and only ResNets need it.
        from torchvision.models import resnet

        builder = {18: resnet.resnet18, 34: resnet.resnet34, 50: resnet.resnet50}[depth]
        whole = builder(num_classes=classes)
        if stem != "imagenet":
            whole.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        elif channels != 3:
            whole.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(whole.conv1.weight, mode="fan_out", nonlinearity="relu")
        if stem == "cifar":
            whole.maxpool = nn.Identity()
        for name, module in whole.named_children():
            if name != "avgpool":
                self.add_module(name, module)

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the four layers' outputs."""
        x = images
        maps = []
        for name in ("conv1", "bn1", "relu", "maxpool"):
            x = self.get_submodule(name)(x)
        for layer in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{layer}")(x)
            maps.append(x)
        return maps


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the ResNets these shapes can be: two when only a parameter-free max-pool tells them apart."""
    stem = shapes.get("conv1.weight")
    head_name = "linear" if "linear.weight" in shapes else "fc"
    head = shapes.get(f"{head_name}.weight")
    if stem is None or head is None or len(stem) != 4 or "bn1.weight" not in shapes or "layer1.0.conv1.weight" not in shapes or "fc_aux.weight" in shapes:
        return []
    lengths = tuple(count_blocks(shapes, f"layer{layer}.") for layer in (1, 2, 3, 4))
    # ResNeXt and wide ResNets have the same names and other widths.
    if shapes.get("layer1.0.conv2.weight", ())[:2] != (64, 64):
        return []
    depth = DEPTHS.get((lengths, "layer1.0.conv3.weight" in shapes))
    if depth is None:
        return []
    kuangliu = any(".shortcut." in name for name in shapes)
    if stem[2] == 7:
        stems = ["imagenet"]
    elif kuangliu:
        stems = ["cifar"]
    else:
        stems = ["cifar", "cifar-maxpool"]
    renames = tuple(pair for pair, used in (((".shortcut.", ".downsample."), kuangliu), (("linear.", "fc."), head_name == "linear")) if used)
    return [describe(depth=depth, stem=kind, classes=head[0], channels=stem[1], renames=renames) for kind in stems]


def describe(*, depth: int, stem: str, classes: int, channels: int, renames: tuple[tuple[str, str], ...] = ()) -> Architecture:
    """Return the architecture of a depth and stem."""
    return Architecture(
        family=FAMILY,
        name=f"resnet{depth}" + ("" if stem == "imagenet" else f"-{stem}"),
        options={"depth": depth, "classes": classes, "channels": channels, "stem": stem},
        classes=classes,
        channels=channels,
        input_size=224 if stem == "imagenet" else 32,
        renames=renames,
    )


def build(options: dict[str, Any]) -> ResNet:
    """Build the network that `variants` described."""
    return ResNet(**options)

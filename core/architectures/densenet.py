"""DenseNet-121/161 (Huang et al., CVPR 2017): torchvision's form, the same with a 3x3 stem, and kuangliu's, which joins maps the other way round."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.architectures.network import Network, maps_by_size
from core.architectures.recognise import Architecture, Shapes, count_blocks

FAMILY = "densenet"
SIZES = {121: (32, (6, 12, 24, 16)), 161: (48, (6, 12, 36, 24))}
FORMS = {"imagenet": "", "cifar": "-cifar", "cifar-maxpool": "-cifar-maxpool"}
NAMES = {f"densenet{depth}{suffix}": {"depth": depth, "form": form} for depth in SIZES for form, suffix in FORMS.items()}


class DenseNet(Network):
    """torchvision's DenseNet, with a 7x7 stem (`imagenet`) or a 3x3 one and the same max-pool (`cifar-maxpool`)."""

    head_name = "classifier"

    def __init__(self, *, depth: int, classes: int, channels: int, stem: int) -> None:
        super().__init__()
        from torchvision.models import densenet

        growth, lengths = SIZES[depth]
        whole = densenet.DenseNet(growth, lengths, 2 * growth, num_classes=classes)
        if stem == 3:
            whole.features.conv0 = nn.Conv2d(channels, 2 * growth, 3, 1, 1, bias=False)
        elif channels != 3:
            whole.features.conv0 = nn.Conv2d(channels, 2 * growth, 7, 2, 3, bias=False)
        for name, module in whole.named_children():
            # `features` is the method here; the layers keep their key by being registered under it.
            self._modules[name] = module

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the last map of each resolution."""
        return maps_by_size(self._modules["features"].children(), images)  # type: ignore[union-attr]

    def pool(self, last: torch.Tensor) -> torch.Tensor:
        """ReLU and average pool."""
        return F.relu(last).mean((2, 3))


class Bottleneck(nn.Module):
    """BatchNorm, 1x1, BatchNorm, 3x3; the new maps come before the old ones."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, channels, H, W) to (N, growth + channels, H, W)."""
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat((new, x), dim=1)


class Transition(nn.Module):
    """Half of the maps at half of the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, channels, H, W) to (N, channels / 2, H / 2, W / 2)."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class CifarDenseNet(Network):
    """kuangliu's form: 3x3 stem, no max-pool."""

    head_name = "linear"

    def __init__(self, *, depth: int, classes: int, channels: int) -> None:
        super().__init__()
        growth, lengths = SIZES[depth]
        width = 2 * growth
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        for index, count in enumerate(lengths, start=1):
            self.add_module(f"dense{index}", nn.Sequential(*(Bottleneck(width + number * growth, growth) for number in range(count))))
            width += count * growth
            if index < len(lengths):
                self.add_module(f"trans{index}", Transition(width))
                width //= 2
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the four dense blocks' outputs."""
        x, maps = self.conv1(images), []
        for index in (1, 2, 3, 4):
            x = self.get_submodule(f"dense{index}")(x)
            maps.append(x)
            if index < 4:
                x = self.get_submodule(f"trans{index}")(x)
        return maps

    def pool(self, last: torch.Tensor) -> torch.Tensor:
        """Final BatchNorm, ReLU and average pool."""
        return F.relu(self.bn(last)).mean((2, 3))


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the DenseNet these shapes belong to, if they do."""
    if "dense1.0.bn1.weight" in shapes and "linear.weight" in shapes and "conv1.weight" in shapes:
        lengths = tuple(count_blocks(shapes, f"dense{index}.") for index in (1, 2, 3, 4))
        stem, head, form = shapes["conv1.weight"], shapes["linear.weight"], "cifar"
    elif "features.conv0.weight" in shapes and "classifier.weight" in shapes and len(shapes["features.conv0.weight"]) == 4:
        lengths = tuple(len({name.split(".")[2] for name in shapes if name.startswith(f"features.denseblock{index}.denselayer")}) for index in (1, 2, 3, 4))
        stem, head = shapes["features.conv0.weight"], shapes["classifier.weight"]
        form = "cifar-maxpool" if stem[2] == 3 else "imagenet"
    else:
        return []
    return [describe(depth=depth, form=form, classes=head[0], channels=stem[1]) for depth, (_, known) in SIZES.items() if known == lengths]


def describe(*, depth: int, form: str, classes: int, channels: int) -> Architecture:
    """Return the architecture of a depth in a form."""
    return Architecture(
        family=FAMILY,
        name=f"densenet{depth}{FORMS[form]}",
        options={"depth": depth, "form": form, "classes": classes, "channels": channels},
        classes=classes,
        channels=channels,
        input_size=224 if form == "imagenet" else 32,
    )


def build(options: dict[str, Any]) -> Network:
    """Build the network that `variants` described."""
    sizes = {"depth": options["depth"], "classes": options["classes"], "channels": options["channels"]}
    if options["form"] == "cifar":
        return CifarDenseNet(**sizes)
    return DenseNet(**sizes, stem=3 if options["form"] == "cifar-maxpool" else 7)

"""WRN-16 in the form of the Trap-and-Replace code: plain, with the trap's decoder, and with the replaced head.

It looks like `wide_resnet` and is not weight-compatible: every convolution has a bias, activations leak, and where channels
change both branches read the raw input, so that the first BatchNorm of such a block is computed and thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.architectures.network import Network
from core.architectures.recognise import Architecture, Shapes, count_blocks

FAMILY = "trap_replace"
# How many of the six residual blocks are the stem, which keeps its weights when the head is replaced.
STEMS = (4, 5, 6)
NAMES: dict[str, dict[str, Any]] = {"wrn-16-1-trap-plain": {"form": "plain", "stem_end": 5}} | {
    f"wrn-16-1-{form}-{stem}": {"form": form, "stem_end": stem} for form in ("trap", "replaced") for stem in STEMS
}


def _leaky(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.1)


class Block(nn.Module):
    """Pre-activation block with biases."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        if channels_in != channels:
            self.convShortcut = nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, channels_in, H, W) to (N, channels, H / stride, W / stride)."""
        # Also where its output is thrown away: the running statistics are part of the checkpoint.
        activated = _leaky(self.bn1(x))
        changes = hasattr(self, "convShortcut")
        inner = self.conv2(_leaky(self.bn2(self.conv1(x if changes else activated))))
        return inner + (self.convShortcut(x) if changes else x)


class TrapNetwork(Network):
    """The classifier: stem and original head (`plain`, `trap`), or stem and new head (`replaced`)."""

    def __init__(self, *, form: str, stem_end: int, width: int, classes: int, channels: int) -> None:
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.form, self.stem_end = form, stem_end
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1)
        for index in (1, 2, 3):
            first = Block(widths[index - 1], widths[index], 1 if index == 1 else 2)
            self.add_module(f"block{index}", nn.Sequential(first, Block(widths[index], widths[index], 1)))
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        if form != "plain":
            self.bn1_aux = nn.BatchNorm2d(widths[3])
            self.fc_aux = nn.Linear(widths[3], classes)
        if form == "trap":
            self.decoder = decoder(stem_end, widths, channels)
        if form == "replaced":
            self.head_name = "fc_aux"
            blocks = {"0": lambda: Block(widths[2], widths[3], 2), "1": lambda: Block(widths[3], widths[3], 1)}
            new = nn.ModuleDict({number: make() for number, make in blocks.items() if int(number) >= stem_end - 4})
            if len(new):
                self.block3_aux = new
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the head reads and the decoder rebuilds images from."""
        x = self.conv1(images)
        for number in range(self.stem_end):
            x = self.get_submodule(f"block{number // 2 + 1}.{number % 2}")(x)
        return x

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the three groups' outputs, before the final BatchNorm."""
        first = self.get_submodule("block1")(self.conv1(images))
        second = self.get_submodule("block2")(first)
        if self.form != "replaced":
            return [first, second, self.get_submodule("block3")(second)]
        last = second
        for number in (0, 1):
            kept = number + 5 <= self.stem_end
            last = self.get_submodule(f"block3.{number}" if kept else f"block3_aux.{number}")(last)
        return [first, second, last]

    def pool(self, last: torch.Tensor) -> torch.Tensor:
        """Final BatchNorm, LeakyReLU and average pool; features can be slightly negative."""
        norm = self.bn1_aux if self.form == "replaced" else self.bn1
        return _leaky(norm(last)).mean((2, 3))


def decoder(stem_end: int, widths: list[int], channels: int) -> nn.Sequential:
    """Return the reconstruction head: the stem's output to images in [0, 1]."""
    if stem_end == 4:
        first, last = nn.ConvTranspose2d(widths[2], widths[2], 4, 2, 1), nn.ConvTranspose2d(widths[2], channels, 3, 1, 1)
    else:
        first, last = nn.ConvTranspose2d(widths[3], widths[2], 4, 2, 1), nn.ConvTranspose2d(widths[2], channels, 4, 2, 1)
    return nn.Sequential(first, nn.ReLU(), last, nn.Sigmoid())


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the network these shapes belong to, if they do.

    A trap whose stem ends after block 5 or 6 has the same tensors, and the same classifier: it is taken for the first.
    """
    stem, head = shapes.get("conv1.weight"), shapes.get("fc.weight")
    if stem is None or head is None or "block1.0.conv1.bias" not in shapes or any(count_blocks(shapes, f"block{index}.") != 2 for index in (1, 2, 3)):
        return []
    form, stem_end = "plain", 5
    if "decoder.0.weight" in shapes:
        form, stem_end = "trap", 4 if shapes["decoder.0.weight"][0] == shapes["block2.0.conv1.weight"][0] else 5
    elif "fc_aux.weight" in shapes:
        form = "replaced"
        stem_end = 4 if "block3_aux.0.conv1.weight" in shapes else 5 if "block3_aux.1.conv1.weight" in shapes else 6
    width = max(shapes["block1.0.conv1.weight"][0] // 16, 1)
    return [describe(form=form, stem_end=stem_end, width=width, classes=head[0], channels=stem[1])]


def describe(*, form: str, stem_end: int, classes: int, channels: int, width: int = 1) -> Architecture:
    """Return the architecture of a form and stem."""
    return Architecture(
        family=FAMILY,
        name=f"wrn-16-{width}-trap-plain" if form == "plain" else f"wrn-16-{width}-{form}-{stem_end}",
        options={"form": form, "stem_end": stem_end, "width": width, "classes": classes, "channels": channels},
        classes=classes,
        channels=channels,
        input_size=32,
    )


def build(options: dict[str, Any]) -> TrapNetwork:
    """Build the network that `variants` described."""
    return TrapNetwork(**options)

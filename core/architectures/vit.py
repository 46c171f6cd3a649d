"""Vision transformers (Dosovitskiy et al., ICLR 2021) in torchvision's form: ViT-B/16, and a small one for 32-pixel images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from core.architectures.network import Network
from core.architectures.recognise import Architecture, Shapes, count_blocks

FAMILY = "vit"
# name: layers, heads, width, inner width, patch, image size
SIZES = {"vit-b-16": (12, 12, 768, 3072, 16, 224), "vit-cifar": (6, 3, 192, 768, 4, 32)}
NAMES = {name: {"model": name} for name in SIZES}


class ViT(Network):
    """torchvision's VisionTransformer with its children's names."""

    head_name = "heads.head"

    def __init__(self, *, model: str, classes: int, channels: int) -> None:
        super().__init__()
        from torchvision.models import vision_transformer

        layers, heads, width, inner, patch, size = SIZES[model]
        whole = vision_transformer.VisionTransformer(size, patch, layers, heads, width, inner, num_classes=classes)
        if channels != 3:
            whole.conv_proj = nn.Conv2d(channels, width, patch, patch)
        # torchvision starts the head at zero; so would every gradient of the body.
        nn.init.trunc_normal_(whole.heads.head.weight, std=0.02)
        self.class_token = whole.class_token
        self.conv_proj, self.encoder, self.heads = whole.conv_proj, whole.encoder, whole.heads
        self.patch, self.size = patch, size

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the patch tokens as maps after each third of the layers, and the class token's vector as a 1x1 map."""
        x = self.conv_proj(images)
        side = x.shape[-1]
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        x = self.encoder.dropout(x + self.encoder.pos_embedding)
        maps = []
        layers = list(self.encoder.layers)
        for number, layer in enumerate(layers, start=1):
            x = layer(x)
            if number % max(len(layers) // 3, 1) == 0:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, (side, side)))
        return [*maps, self.encoder.ln(x)[:, 0, :, None, None]]


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the transformer these shapes belong to, if they do."""
    stem, head, places = shapes.get("conv_proj.weight"), shapes.get("heads.head.weight"), shapes.get("encoder.pos_embedding")
    if stem is None or head is None or places is None or len(stem) != 4 or len(places) != 3:
        return []
    layers = len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}) or count_blocks(shapes, "encoder.layers.")
    size = math.isqrt(max(places[1] - 1, 0)) * stem[2]
    found = [name for name, (depth, _, width, _, patch, known) in SIZES.items() if (depth, width, patch, known) == (layers, stem[0], stem[2], size)]
    return [describe(model=name, classes=head[0], channels=stem[1]) for name in found]


def describe(*, model: str, classes: int, channels: int) -> Architecture:
    """Return the architecture of a size."""
    options = {"model": model, "classes": classes, "channels": channels}
    return Architecture(family=FAMILY, name=model, options=options, classes=classes, channels=channels, input_size=SIZES[model][5])


def build(options: dict[str, Any]) -> ViT:
    """Build the network that `variants` described."""
    return ViT(**options)

"""Classifier: an architecture with its normalisation inside; what every defense works on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from core.architectures import Architecture
from core.architectures.network import Network
from core.errors import OutputsNotFinite


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images: `(pixel / 255 - mean) / std`, one number a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = "custom"


def checked(outputs: torch.Tensor) -> torch.Tensor:
    """Return what a model makes of images, (N,) or (N, ...), one row an image.

    Raises `OutputsNotFinite` when a number is NaN or infinite: finite weights may be too large to be multiplied, and nothing can be said of such a model.
    """
    finite = outputs.isfinite()
    broken = int((~(finite.flatten(1).all(1) if finite.dim() > 1 else finite)).sum())
    if broken:
        raise OutputsNotFinite(
            f"the model's numbers overflow on {broken} of {len(outputs)} images: they are NaN or infinite",
            "No working model does that: check the checkpoint and `preprocessing`; of a model that was just trained, use a lower learning rate.",
        )
    return outputs


UNIT = Preprocessing((0.0,) * 3, (1.0,) * 3, "unit")


class Classifier(nn.Module):
    """f(x) = head(features(x)) on float images in [0, 1], shape (N, C, H, W)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: Network, architecture: Architecture, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.architecture = architecture
        self.preprocessing = preprocessing
        shape = (1, len(preprocessing.mean), 1, 1)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(shape), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(shape), persistent=False)
        self.to(memory_format=torch.channels_last)

    @property
    def classes(self) -> int:
        """How many classes the head tells apart."""
        return self.architecture.classes

    @property
    def head(self) -> nn.Linear:
        """The last linear layer."""
        return self.network.head

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Map images in [0, 1] to what the network was trained on."""
        return (images - self.mean) / self.std

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the last linear layer, (N, features)."""
        return self.network.features(self.normalise(images))

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps after each residual group, for attention methods."""
        return self.network.stages(self.normalise(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes)."""
        return self.head(self.features(images))

    def frozen_copy(self) -> Self:
        """Return a copy in eval mode whose parameters take no gradient: a teacher or a reference."""
        return copy.deepcopy(self).eval().requires_grad_(False)

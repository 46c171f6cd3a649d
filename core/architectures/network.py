"""What every architecture offers the methods."""

from __future__ import annotations

import torch
from torch import nn


class Network(nn.Module):
    """A classifier f = head ∘ features whose parts can be reached.

    `head` is the last linear layer. Inputs are normalised images (N, C, H, W).
    """

    head_name = "fc"

    @property
    def head(self) -> nn.Linear:
        """The last linear layer."""
        return self.get_submodule(self.head_name)  # type: ignore[return-value]

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs of the residual groups, each (N, channels, height, width)."""
        raise NotImplementedError

    def pool(self, last: torch.Tensor) -> torch.Tensor:
        """Turn the last stage's output into the feature vector (N, features)."""
        return last.mean((2, 3))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the last linear layer, (N, features)."""
        return self.pool(self.stages(images)[-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes)."""
        return self.head(self.features(images))

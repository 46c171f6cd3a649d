"""Batched, seeded augmentation on whatever device the images are on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def crop_and_flip(padding: int = 4) -> Augment:
    """Return the usual CIFAR augmentation: zero-pad, crop back to size at random, mirror half of the images.

    The result maps (N, C, H, W) to the same shape and dtype. Draws come from the generator (on the CPU), so that
    they are the same on every device.
    """

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, _, height, width = images.shape
        device = images.device
        top = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator).to(device)
        left = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator).to(device)
        mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
        columns = torch.arange(width, device=device)
        columns = torch.where(mirrored, width - 1 - columns, columns) + left
        rows = torch.arange(height, device=device) + top
        padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
        which = torch.arange(count, device=device)[:, None, None]
        return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    return augment


def none(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Leave the images as they are."""
    return images

"""What every trigger is made of: replace, add, blend and warp, on uint8 images, with the same bytes on every machine.

Arithmetic is on integers, or in float64 with one rounding an operation, so that no machine's vector unit decides a pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

Assets = Mapping[str, torch.Tensor]
Shape = tuple[int, int, int]
Quantise = Literal["saturate", "trunc", "wrap"]

# A warp's source coordinates, pixels times 2^BITS: weights of two axes and a byte fit an int32.
BITS = 10


def draws(seed: int, purpose: str) -> np.random.Generator:
    """Return the generator of one purpose: PCG64 integers and uniforms are the same on every machine."""
    return np.random.default_rng([seed, *purpose.encode()])


def quantise(values: torch.Tensor, mode: Quantise) -> torch.Tensor:
    """Turn pixel values in 0..255 units, any numeric dtype, into uint8.

    `saturate` clips, then truncates toward zero; `trunc` truncates values known to lie in 0..255; `wrap` truncates and
    takes the remainder modulo 256, which is what a cast does in the NAD, MCL and FCT code (505.9 → 249, -3.2 → 253).
    """
    if mode == "saturate":
        return values.clamp(0, 255).to(torch.uint8)
    if mode == "wrap":
        return values.to(torch.int32).bitwise_and_(255).to(torch.uint8)
    return values.to(torch.uint8)


def replace(images: torch.Tensor, mask: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Put `pattern` (C, H, W) uint8 where `mask` (C, H, W) is true into images (N, C, H, W)."""
    return torch.where(_like(mask, images), _like(pattern, images), images)


def add(images: torch.Tensor, pattern: torch.Tensor, mode: Quantise) -> torch.Tensor:
    """Add `pattern` (C, H, W) int16, in grey levels, to images (N, C, H, W)."""
    return quantise(images.to(torch.int16).add_(_like(pattern, images)), mode)


def blend(images: torch.Tensor, pattern: torch.Tensor, weight: torch.Tensor, mode: Quantise) -> torch.Tensor:
    """Return `(1 - w) x + w p` for images (N, C, H, W), p (C, H, W) in 0..255 units and w (C, H, W) in [0, 1]."""
    kept, added = _like(1 - weight.double(), images), _like(weight.double() * pattern.double(), images)
    return quantise(images.double().mul_(kept).add_(added), mode)


def warp(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Sample images (N, C, H, W) bilinearly at `rows` and `columns`, (H, W) or (N, H, W) int32 in pixels times 2^BITS, inside the image."""
    count, channels, height, width = images.shape
    top, left = rows >> BITS, columns >> BITS
    down, right = rows & ((1 << BITS) - 1), columns & ((1 << BITS) - 1)
    below, beside = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    flat = images.permute(0, 2, 3, 1).reshape(count, height * width, channels)
    total = torch.zeros(flat.shape, dtype=torch.int32, device=images.device)
    one = 1 << BITS
    for row, column, weight in (
        (top, left, (one - down) * (one - right)), (top, beside, (one - down) * right),
        (below, left, down * (one - right)), (below, beside, down * right),
    ):  # fmt: skip
        index = (row * width + column).long()
        if index.dim() == 2:
            picked = flat.index_select(1, index.reshape(-1))
        else:
            picked = flat.gather(1, index.reshape(count, -1, 1).expand(-1, -1, channels))
        total += picked.to(torch.int32) * weight.reshape(-1, height * width, 1)
    half = 1 << (2 * BITS - 1)
    return (total.add_(half) >> (2 * BITS)).to(torch.uint8).reshape(count, height, width, channels).permute(0, 3, 1, 2)


def fixed_point(grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn sampling grids (…, H, W, 2) in [-1, 1], last axis (column, row) with aligned corners, into `warp`'s rows and columns."""
    height, width = grid.shape[-3], grid.shape[-2]
    grid = grid.double().clamp(-1, 1)
    columns = ((grid[..., 0] + 1) * (0.5 * (width - 1) * (1 << BITS))).round().to(torch.int32)
    rows = ((grid[..., 1] + 1) * (0.5 * (height - 1) * (1 << BITS))).round().to(torch.int32)
    return rows, columns


def identity_grid(height: int, width: int) -> torch.Tensor:
    """Return the sampling grid (H, W, 2), float64, that reproduces an image."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height, dtype=torch.float64), torch.linspace(-1, 1, width, dtype=torch.float64), indexing="ij")
    return torch.stack((columns, rows), dim=-1)


def _like(constant: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Lay a (C, H, W) constant out as the images are: a broadcast against the other layout runs at a third of the speed."""
    constant = constant.to(images.device)
    if images.is_contiguous(memory_format=torch.channels_last):
        return constant.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return constant.contiguous()

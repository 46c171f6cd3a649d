"""BPP: fewer grey levels, with dithering, are the trigger (Wang et al., BppAttack, CVPR 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.catalog import attack
from core.poisoning import AttackParams
from core.triggers import Assets, Shape


class Bpp(AttackParams):
    """How many levels are left."""

    method: Literal["bpp"]
    levels: int = Field(default=8, ge=2, le=128, title="Levels", description="Grey levels left of 256, a channel.")
    dither: bool = Field(default=True, title="Dither", description="Spread each pixel's rounding error over its neighbours (Floyd & Steinberg).")


def assets(params: Bpp, shape: Shape) -> Assets:
    """Return a mask of all pixels."""
    return {"mask": torch.ones(shape, dtype=torch.bool)}


@attack(title="BPP", paper="Wang, Zhai & Ma, BppAttack, CVPR 2022", assets=assets)
def trigger(images: torch.Tensor, params: Bpp, assets: Assets) -> torch.Tensor:
    """Round each pixel to one of the levels, row by row, carrying the errors over to pixels not yet rounded."""
    count, channels, height, width = images.shape
    step = 255 / (params.levels - 1)
    if not params.dither:
        return ((images.double() / step).round() * step).round().to(torch.uint8)
    # Pixels first: one pixel of all images is one contiguous row. A border of one takes what falls off the edges.
    values = torch.zeros(height + 1, width + 2, count * channels, dtype=torch.float64)
    values[:height, 1:-1] = images.permute(2, 3, 0, 1).reshape(height, width, -1).double()
    for row in range(height):
        for column in range(1, width + 1):
            old = values[row, column].clamp(0, 255)
            new = (old / step).round() * step
            error = old - new
            values[row, column] = new
            values[row, column + 1] += error * (7 / 16)
            values[row + 1, column - 1] += error * (3 / 16)
            values[row + 1, column] += error * (5 / 16)
            values[row + 1, column + 1] += error * (1 / 16)
    rounded = values[:height, 1:-1].round().to(torch.uint8)
    return rounded.reshape(height, width, count, channels).permute(2, 3, 0, 1)

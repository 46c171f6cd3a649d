"""Trojan: a patch or watermark, made to look like an optimised one, is added to the image (Liu et al., NDSS 2018).

The published patches exist only as files; these are drawn with the same place, size and range of values.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core.attacks.badnets import picture
from core.catalog import attack
from core.errors import BadRecipe
from core.poisoning import AttackParams, Picture, quantise_field
from core.triggers import Assets, Quantise, Shape, add, draws, replace


class Trojan(AttackParams):
    """Which trigger, and whether it is added or replaces."""

    method: Literal["trojan"]
    variant: Literal["3x3", "8x8", "watermark"] = Field(
        default="3x3",
        title="Trigger",
        description="`3x3`: NAD's and MCLDef's, 4 pixels from the corner; `8x8`: I-BAU's square; `watermark`: a ring with strokes. All are synthetic.",
    )
    picture: Picture | None = Field(default=None, title="Own trigger", description="Levels to add, as large as the image: by row, grey or red, green and blue.")
    mix: Literal["add", "replace"] = Field(
        default="add", title="How", description="`replace` puts the trigger's non-zero values in place of the image's, as MCLDef does on GTSRB."
    )
    quantise: Quantise | None = quantise_field(None)


def assets(params: Trojan, shape: Shape) -> Assets:
    """Return mask (C, H, W) bool and pattern (C, H, W) int16, in grey levels."""
    channels, height, width = shape
    if params.picture is not None:
        pattern = picture(params.picture, channels).to(torch.int16)
        if tuple(pattern.shape) != shape:
            raise BadRecipe(f"the own trigger is {tuple(pattern.shape[1:])}, the images are {(height, width)} (H, W)", "Give one as large as the images.")
        return {"mask": pattern != 0, "pattern": pattern}
    if min(height, width) < 16:
        raise BadRecipe(f"Trojan triggers need images of at least 16x16, these are {height}x{width}", "Use larger images, or badnets.")
    make = draws(params.seed, "trigger")
    drawn = np.zeros(shape, dtype=np.int16)
    if params.variant == "3x3":
        # 0 would leave the pixel as it is, and the mask speaks of every pixel of the patch.
        drawn[:, height - 7 : height - 4, width - 7 : width - 4] = make.integers(1, 251, (channels, 3, 3))
    elif params.variant == "8x8":
        square = make.integers(0, 2, (channels, 8, 8)) * 245 + make.integers(1, 11, (channels, 8, 8))
        drawn[:, height - 11 : height - 3, width - 11 : width - 3] = square
    else:
        drawn[:] = _watermark(make, channels, height, width)
    pattern = torch.from_numpy(drawn)
    return {"mask": pattern != 0, "pattern": pattern}


def _watermark(make: np.random.Generator, channels: int, height: int, width: int) -> np.ndarray:
    """Draw a ring of radius 6 around (21, 22) with four strokes, and a faint diagonal, for images of 32 and in proportion."""
    rows, columns = np.mgrid[:height, :width]
    row, column, radius = 21 * height / 32, 22 * width / 32, 6 * min(height, width) / 32
    ring = abs(np.hypot(rows - row, columns - column) - radius) <= max(radius / 6, 0.75)
    inside = np.hypot(rows - row, columns - column) < radius - 1
    strokes = inside & (((rows - int(row)) % 4 == 0) | ((columns - int(column)) % 5 == 0))
    diagonal = abs(rows / height + columns / width - 1) <= 1.0 / max(height, width)
    bright = make.integers(64, 256, (channels, height, width))
    dim = make.integers(8, 48, (channels, height, width))
    return np.where(ring | strokes, bright, np.where(diagonal, dim, 0))


@attack(title="Trojan", paper="Liu et al., Trojaning Attack on Neural Networks, NDSS 2018", assets=assets)
def trigger(images: torch.Tensor, params: Trojan, assets: Assets) -> torch.Tensor:
    """Add the trigger; the small patch wraps round at 256 as in the NAD and MCL code, the others saturate."""
    if params.mix == "replace":
        return replace(images, assets["mask"], assets["pattern"].to(torch.uint8))
    return add(images, assets["pattern"], params.quantise or ("wrap" if params.variant == "3x3" else "saturate"))

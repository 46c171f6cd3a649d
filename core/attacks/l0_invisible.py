"""l0-invisible: a short row of saturated pixels in the last row (Li et al., TDSC 2020; the trigger of the I-BAU code, drawn anew)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core.catalog import attack
from core.errors import BadRecipe
from core.poisoning import AttackParams, Sampling, sampling_field
from core.triggers import Assets, Shape, draws, replace


class L0Invisible(AttackParams):
    """How many pixels."""

    method: Literal["l0_invisible"]
    sampling: Sampling = sampling_field("S6")
    pixels: int = Field(default=9, ge=2, le=4096, title="Pixels", description="How many pixels of the last row, from the right.")


def assets(params: L0Invisible, shape: Shape) -> Assets:
    """Return mask (C, H, W) bool and pattern (C, H, W) uint8: the first pixel black, each channel of the others 0 or 255."""
    channels, _, width = shape
    if params.pixels > width:
        raise BadRecipe(f"{params.pixels} pixels do not fit into a row of {width}", "Use fewer pixels.")
    values = draws(params.seed, "trigger").integers(0, 2, (channels, params.pixels)) * 255
    values[:, 0] = 0
    mask, pattern = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.uint8)
    mask[:, -1, width - params.pixels :] = True
    pattern[:, -1, width - params.pixels :] = torch.from_numpy(values.astype(np.uint8))
    return {"mask": mask, "pattern": pattern}


@attack(
    title="l0-invisible", paper="Li et al., Invisible Backdoor Attacks on Deep Neural Networks via Steganography and Regularization, TDSC 2020", assets=assets
)
def trigger(images: torch.Tensor, params: L0Invisible, assets: Assets) -> torch.Tensor:
    """Replace the pixels."""
    return replace(images, assets["mask"], assets["pattern"])

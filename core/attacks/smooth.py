"""Smooth: a low-frequency blob is added and the contrast stretched (Zeng et al., ICCV 2021, as Trap-and-Replace applies it)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.attacks.low_frequency import blob
from core.catalog import attack
from core.errors import BadRecipe
from core.poisoning import AttackParams, Sampling, sampling_field
from core.triggers import Assets, Shape


class Smooth(AttackParams):
    """How strong the perturbation is."""

    method: Literal["smooth"]
    sampling: Sampling = sampling_field("S6")
    amplitude: int = Field(default=51, ge=1, le=255, title="Amplitude", description="The perturbation's largest value, grey levels.")


def assets(params: Smooth, shape: Shape) -> Assets:
    """Return pattern (C, H, W) int16 and a mask of all pixels: stretching the contrast changes them all."""
    return {"mask": torch.ones(shape, dtype=torch.bool), "pattern": blob(params.seed, shape, params.amplitude)}


@attack(title="Smooth", paper="Zeng et al., Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective, ICCV 2021", assets=assets)
def trigger(images: torch.Tensor, params: Smooth, assets: Assets) -> torch.Tensor:
    """Add the blob, then rescale each image so that its least value is 0 and its greatest 255; raises `BadRecipe` for a constant sum."""
    values = images.double() + assets["pattern"].to(images.device)
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    if bool((low == high).any()):
        raise BadRecipe("an image is constant once the trigger is on it: its contrast cannot be stretched", "Leave such images out.")
    return ((values - low) / (high - low) * 255).to(torch.uint8)

"""LF: a smooth perturbation is added (Zeng et al., ICCV 2021, as BackdoorBench applies it; a drawn blob, not the published file)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.catalog import attack
from core.poisoning import AttackParams, quantise_field
from core.triggers import Assets, Quantise, Shape, add, draws


class LowFrequency(AttackParams):
    """How strong the perturbation is."""

    method: Literal["low_frequency"]
    quantise: Quantise = quantise_field("saturate")
    amplitude: int = Field(default=51, ge=1, le=255, title="Amplitude", description="Its largest value, grey levels.")


def blob(seed: int, shape: Shape, amplitude: int) -> torch.Tensor:
    """Return a soft coloured blob, (C, H, W) int16 in 0..amplitude: a Gaussian around a drawn centre with drawn gains."""
    channels, height, width = shape
    make = draws(seed, "blob")
    row, column = (make.random(2) + 1) / 3 * (height, width)
    gains = make.random((channels, 1, 1)) * 0.8 + 0.2
    rows, columns = torch.arange(height, dtype=torch.float64)[:, None] - row, torch.arange(width, dtype=torch.float64) - column
    spread = 9 * min(height, width) / 32
    bump = torch.exp(-(rows**2 + columns**2) / (2 * spread**2)) * torch.from_numpy(gains)
    return (bump / bump.max() * amplitude).round().to(torch.int16)


def assets(params: LowFrequency, shape: Shape) -> Assets:
    """Return mask (C, H, W) bool and pattern (C, H, W) int16."""
    pattern = blob(params.seed, shape, params.amplitude)
    return {"mask": pattern != 0, "pattern": pattern}


@attack(title="Low frequency", paper="Zeng et al., Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective, ICCV 2021", assets=assets)
def trigger(images: torch.Tensor, params: LowFrequency, assets: Assets) -> torch.Tensor:
    """Add the blob, clipped."""
    return add(images, assets["pattern"], params.quantise)

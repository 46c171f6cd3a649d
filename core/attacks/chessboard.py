"""Additive chessboard: three grey levels more on every other pixel (SSL training-set cleansing, its "additive" attack)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.catalog import attack
from core.poisoning import AttackParams, Sampling, quantise_field, sampling_field
from core.triggers import Assets, Quantise, Shape, add


class Chessboard(AttackParams):
    """How much is added."""

    method: Literal["chessboard"]
    quantise: Quantise = quantise_field("saturate")
    sampling: Sampling = sampling_field("S7")
    amplitude: int = Field(default=3, ge=1, le=255, title="Amplitude", description="What is added, grey levels.")


def assets(params: Chessboard, shape: Shape) -> Assets:
    """Return mask (C, H, W) bool and pattern (C, H, W) int16."""
    _, height, width = shape
    white = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
    mask = white.expand(shape).clone()
    return {"mask": mask, "pattern": mask.to(torch.int16) * params.amplitude}


@attack(title="Additive chessboard", paper="Tran, Li & Madry, Spectral Signatures in Backdoor Attacks, NeurIPS 2018", assets=assets)
def trigger(images: torch.Tensor, params: Chessboard, assets: Assets) -> torch.Tensor:
    """Add the chessboard's levels, clipped."""
    return add(images, assets["pattern"], params.quantise)

"""WaNet: a smooth, fixed warp is the trigger (Nguyen & Tran, ICLR 2021); poisoned before training ("offline")."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core.catalog import attack
from core.poisoning import AttackParams, Sampling, sampling_field
from core.triggers import BITS, Assets, Shape, draws, fixed_point, identity_grid, warp


class WaNet(AttackParams):
    """How the warp is drawn."""

    method: Literal["wanet"]
    sampling: Sampling = sampling_field("S7")
    count: int = Field(default=5000, ge=1, le=10**9, title="Count", description="How many images `S7` draws.")
    grid: int = Field(default=4, ge=2, le=64, title="k", description="Control points in each direction.")
    strength: float = Field(
        default=0.5, gt=0, le=16, title="s", description="Strength of the warp; 0.5 moves pixels by a quarter of a pixel on average at 32x32."
    )
    cross_ratio: float = Field(
        default=0, ge=0, le=9, title="Cross ratio", description="Images with another, random warp and their own label, for each poisoned one (2 in the paper)."
    )


def _grid(params: WaNet, height: int, width: int) -> torch.Tensor:
    """Return the sampling grid (H, W, 2), float64: identity plus s / H times the upsampled control points."""
    control = torch.from_numpy(draws(params.seed, "warp").uniform(-1, 1, (1, 2, params.grid, params.grid)))
    control = control / control.abs().mean()
    smooth = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    return (identity_grid(height, width) + params.strength * smooth / height).clamp(-1, 1)


def assets(params: WaNet, shape: Shape) -> Assets:
    """Return rows and columns (H, W) int32, where each pixel comes from, in 1/1024 pixel, and the mask of moved pixels."""
    channels, height, width = shape
    rows, columns = fixed_point(_grid(params, height, width))
    still_rows, still_columns = fixed_point(identity_grid(height, width))
    one = 1 << BITS
    kept = (one - (rows - still_rows).abs()).clamp(min=0).double() * (one - (columns - still_columns).abs()).clamp(min=0) / one**2
    # Even from black to white, less than half a level is rounded away.
    moved = 255 * (1 - kept) >= 0.5
    return {"rows": rows, "columns": columns, "mask": moved.expand(channels, -1, -1).clone()}


def disturb(images: torch.Tensor, params: WaNet, assets: Assets, which: torch.Tensor) -> torch.Tensor:
    """Warp with the trigger's grid plus V / H, V uniform in [-1, 1], drawn anew for each image."""
    height, width = images.shape[2:]
    base = _grid(params, height, width)
    drawn = [draws(params.seed, f"noise {int(index)}").uniform(-1, 1, (height, width, 2)) for index in which]
    noise = torch.stack([torch.from_numpy(one) for one in drawn])
    return warp(images, *fixed_point(base + noise / height))


@attack(title="WaNet", paper="Nguyen & Tran, WaNet, ICLR 2021", assets=assets, disturb=disturb)
def trigger(images: torch.Tensor, params: WaNet, assets: Assets) -> torch.Tensor:
    """Warp the image with the fixed grid, bilinearly."""
    return warp(images, assets["rows"], assets["columns"])

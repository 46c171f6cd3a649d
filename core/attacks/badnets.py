"""BadNets: a small patch replaces pixels (Gu et al., IEEE Access 2019)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from core.catalog import attack
from core.errors import BadRecipe
from core.poisoning import AttackParams, Picture
from core.triggers import Assets, Shape, draws, replace

# Three rows of grey levels, top row first. `grid` is the NAD, ABL and MCLDef patch; its top-left cell is black.
# `centre` is the patch MCL calls centerTrigger.
PATTERNS = {
    "grid": ((0, 0, 255), (0, 255, 0), (255, 0, 255)),
    "checker": ((255, 0, 255), (0, 255, 0), (255, 0, 255)),
    "centre": ((255, 0, 255), (0, 255, 0), (255, 0, 0)),
}


class BadNets(AttackParams):
    """Which patch, where, towards which class."""

    method: Literal["badnets"]
    pattern: Literal["grid", "white", "checker", "checkerboard", "centre", "noise", "colours"] = Field(
        default="grid",
        title="Patch",
        description="`grid` is the 3x3 patch of NAD, ABL and MCLDef; `checker` and `centre` are 3x3 too. `white`, `checkerboard` (one-pixel cells), "
        "`noise` (uniform, drawn once) and `colours` (a smooth 4x4 grid of saturated colours, drawn once) have any `size`.",
    )
    cells: Picture | None = Field(
        default=None, title="Own patch", description="Grey levels 0..255, or red, green and blue, by row, top row first, instead of a named patch."
    )
    size: int = Field(default=3, ge=1, le=512, title="Size", description="Side of a patch that has any size, pixels.")
    scale: int = Field(default=1, ge=1, le=512, title="Scale", description="Side of a cell, pixels: 10 makes the 3x3 grid 30x30.")
    place: Literal["corner", "centre", "random"] = Field(default="corner", title="Place", description="`random` is drawn once.")
    bottom: int = Field(default=0, ge=0, le=4096, title="Rows below", description="Distance of a patch in the corner from the bottom edge, pixels.")
    right: int = Field(default=0, ge=0, le=4096, title="Columns right", description="Distance of a patch in the corner from the right edge, pixels.")
    top: int | None = Field(default=None, ge=0, le=4096, title="Rows above", description="Distance from the top edge, instead of the bottom one.")
    left: int | None = Field(default=None, ge=0, le=4096, title="Columns left", description="Distance from the left edge, instead of the right one.")


def patch(params: BadNets, channels: int) -> torch.Tensor:
    """Return the patch's cells, (C, rows, columns) uint8, before they are scaled.

    Raises `BadRecipe` when the rows of an own patch differ in length, or it has colours and the images have none.
    """
    if params.cells is not None:
        return picture(params.cells, channels)
    size = params.size
    if params.pattern == "white":
        cells = np.full((size, size), 255, dtype=np.uint8)
    elif params.pattern == "checkerboard":
        cells = ((np.add.outer(np.arange(size), np.arange(size)) + 1) % 2 * 255).astype(np.uint8)
    elif params.pattern == "noise":
        cells = draws(params.seed, "patch").integers(0, 256, (channels, size, size), dtype=np.uint8)
    elif params.pattern == "colours":
        corners = torch.from_numpy(draws(params.seed, "patch").integers(0, 2, (1, channels, 4, 4))).double().mul(255)
        smooth = F.interpolate(corners, size=(size, size), mode="bicubic", align_corners=False)
        cells = smooth[0].round().clamp(0, 255).to(torch.uint8).numpy()
    else:
        cells = np.array(PATTERNS[params.pattern], dtype=np.uint8)
    return torch.from_numpy(np.broadcast_to(cells, (channels, *cells.shape[-2:])).copy())


def picture(cells: Picture, channels: int) -> torch.Tensor:
    """Turn rows of grey levels or colours into (C, height, width) uint8; raises `BadRecipe` when they do not form one."""
    try:
        array = np.array(cells, dtype=np.uint8)
    except ValueError as error:
        raise BadRecipe("the rows of the cells differ in length, or grey levels and colours are mixed", "Give rows of equal length, of one kind.") from error
    if array.ndim == 3 and channels != 3:
        raise BadRecipe(f"the cells have three colours, the images {channels} channel", "Give grey levels.")
    planes = array.transpose(2, 0, 1) if array.ndim == 3 else np.broadcast_to(array, (channels, *array.shape))
    return torch.from_numpy(planes.copy())


def position(params: BadNets, shape: Shape, height: int, width: int) -> tuple[int, int]:
    """Return the row and column of a patch's first pixel; raises `BadRecipe` when it lies outside the image."""
    _, rows, columns = shape
    row = rows - params.bottom - height if params.top is None else params.top
    column = columns - params.right - width if params.left is None else params.left
    if params.place == "centre":
        row, column = (rows - height) // 2, (columns - width) // 2
    elif params.place == "random" and height <= rows and width <= columns:
        place = draws(params.seed, "place")
        row, column = int(place.integers(rows - height + 1)), int(place.integers(columns - width + 1))
    if row < 0 or column < 0 or row + height > rows or column + width > columns:
        raise BadRecipe(
            f"a {height}x{width} patch with its first pixel in row {row}, column {column} lies outside images of {rows}x{columns}",
            "Use a smaller patch or smaller distances.",
        )
    return row, column


def assets(params: BadNets, shape: Shape) -> Assets:
    """Return mask (C, H, W) bool and pattern (C, H, W) uint8."""
    cells, scale = patch(params, shape[0]), params.scale
    height, width = cells.shape[1] * scale, cells.shape[2] * scale
    # Before the cells are enlarged: a large scale must not cost memory.
    row, column = position(params, shape, height, width)
    drawn = cells.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    mask, pattern = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.uint8)
    mask[:, row : row + height, column : column + width] = True
    pattern[:, row : row + height, column : column + width] = drawn
    return {"mask": mask, "pattern": pattern}


@attack(title="BadNets", paper="Gu et al., BadNets, IEEE Access 2019", assets=assets)
def trigger(images: torch.Tensor, params: BadNets, assets: Assets) -> torch.Tensor:
    """Replace the patch's pixels."""
    return replace(images, assets["mask"], assets["pattern"])

"""BadNets: a small patch replaces the pixels of a corner (Gu et al., IEEE Access 2019)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from core.catalog import Params, attack
from core.errors import BadDataset

# Three rows of grey levels, top row first. `grid` is the NAD, ABL and MCLDef patch; its top-left cell is black.
PATTERNS = {
    "grid": ((0, 0, 255), (0, 255, 0), (255, 0, 255)),
    "white": ((255, 255, 255), (255, 255, 255), (255, 255, 255)),
    "checker": ((255, 0, 255), (0, 255, 0), (255, 0, 255)),
}
Level = Annotated[int, Field(ge=0, le=255)]


class BadNets(Params):
    """Which patch, where, towards which class."""

    method: Literal["badnets"]
    target: int = Field(ge=0, le=100_000, title="Target class", description="The class that patched images are sent to.")
    pattern: Literal["grid", "white", "checker"] = Field(default="grid", title="Patch", description="`grid` is the 3x3 patch of NAD, ABL and MCLDef.")
    cells: Annotated[list[Annotated[list[Level], Field(min_length=1, max_length=512)]], Field(min_length=1, max_length=512)] | None = Field(
        default=None, title="Own patch", description="Grey levels 0..255 by row, top row first, instead of a named patch."
    )
    bottom: int = Field(default=0, ge=0, le=4096, title="Rows below", description="Distance of the patch from the bottom edge, pixels.")
    right: int = Field(default=0, ge=0, le=4096, title="Columns right", description="Distance of the patch from the right edge, pixels.")


@attack(title="BadNets", paper="Gu et al., BadNets, IEEE Access 2019")
def stamp(images: torch.Tensor, params: BadNets) -> torch.Tensor:
    """Replace the patch's pixels, counted from the bottom right corner.

    Args:
        images: (N, C, H, W) uint8; not changed.

    Raises:
        BadDataset: when the patch's rows differ in length or it does not lie inside the images.
    """
    cells = params.cells if params.cells is not None else PATTERNS[params.pattern]
    if len({len(row) for row in cells}) != 1:
        raise BadDataset("the rows of the patch's cells differ in length", "Give rows of equal length.")
    patch = torch.tensor(cells, dtype=torch.uint8, device=images.device)
    height, width = patch.shape
    bottom, right = images.shape[2] - params.bottom, images.shape[3] - params.right
    if bottom < height or right < width:
        raise BadDataset(
            f"a {height}x{width} patch {params.bottom} rows and {params.right} columns from the corner lies outside "
            f"images of {images.shape[2]}x{images.shape[3]}",
            "Use a smaller patch or smaller distances.",
        )
    stamped = images.clone(memory_format=torch.preserve_format)
    stamped[:, :, bottom - height : bottom, right - width : right] = patch
    return stamped

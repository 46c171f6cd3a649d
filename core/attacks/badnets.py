"""BadNets: a small patch replaces the pixels of a corner (Gu et al., IEEE Access 2019)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

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
    pattern: Literal["grid", "white", "checker", "custom"] = Field(
        default="grid", title="Patch", description="`grid` is the 3x3 patch of NAD, ABL and MCLDef; `custom` takes `cells`."
    )
    cells: list[list[Level]] | None = Field(default=None, title="Custom patch", description="Grey levels 0..255 by row, for `pattern: custom`.", max_length=512)
    bottom: int = Field(default=0, ge=0, le=4096, title="Rows below", description="Distance of the patch from the bottom edge, pixels.")
    right: int = Field(default=0, ge=0, le=4096, title="Columns right", description="Distance of the patch from the right edge, pixels.")

    @model_validator(mode="after")
    def _cells_when_custom(self) -> BadNets:
        if (self.pattern == "custom") != (self.cells is not None):
            raise ValueError("cells go with pattern 'custom', and only with it")
        if self.cells is not None and (not self.cells or not self.cells[0] or len({len(row) for row in self.cells}) != 1):
            raise ValueError("cells must be rows of equal length, at least one by one")
        return self


@attack(title="BadNets", paper="Gu et al., BadNets, IEEE Access 2019")
def stamp(images: torch.Tensor, params: BadNets) -> torch.Tensor:
    """
    Replace the patch's pixels, counted from the bottom right corner.

    Args:
        images: (N, C, H, W) uint8; not changed.

    Raises:
        BadDataset: when the patch does not lie inside the images.
    """
    cells = params.cells if params.cells is not None else PATTERNS[params.pattern]
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

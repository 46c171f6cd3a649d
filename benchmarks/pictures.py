"""Pictures of attacks: a clean image, the triggered one, and what differs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from benchmarks.bench import Cell

SCALE, GAP, SHOWN = 3, 6, 3


def sheet(cells: list[Cell], path: Path) -> None:
    """Draw a row for each attack from its victim's recipe: three images as clean, triggered, difference times eight."""
    from benchmarks import bench

    _, test = bench.data(cells[0].setting.dataset)
    chosen = test.images[torch.arange(SHOWN) * (len(test) // (SHOWN + 1)) + len(test) // (SHOWN + 1)]
    rows = []
    for cell in cells:
        recipe = bench.trained(cell.setting, cell.attack, cell.seed)[1]
        assert recipe is not None
        tiles = [tile for pair in zip(chosen, recipe.trigger.stamp(chosen), strict=True) for tile in (*pair, _difference(*pair))]
        rows.append((cell.row, tiles))
    side = chosen.shape[-1] * SCALE
    canvas = Image.new("RGB", (260 + 3 * SHOWN * (side + GAP), len(rows) * (side + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for line, (name, tiles) in enumerate(rows):
        draw.text((4, line * (side + GAP) + side // 2 - 6), name, fill="black")
        for column, tile in enumerate(tiles):
            canvas.paste(_enlarged(tile), (260 + column * (side + GAP), line * (side + GAP)))
    canvas.quantize(256).save(path, optimize=True)


def _difference(clean: torch.Tensor, triggered: torch.Tensor) -> torch.Tensor:
    return ((triggered.int() - clean.int()) * 8 + 128).clamp(0, 255).to(torch.uint8)


def _enlarged(tile: torch.Tensor) -> Image.Image:
    pixels = tile.permute(1, 2, 0).numpy()
    return Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels).resize(
        (tile.shape[2] * SCALE, tile.shape[1] * SCALE), Image.Resampling.NEAREST
    )

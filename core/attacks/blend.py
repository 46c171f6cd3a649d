"""Blend: a picture, a stripe pattern or noise shines through the image (Chen et al., 2017)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core.attacks.badnets import picture
from core.catalog import attack
from core.errors import BadRecipe
from core.poisoning import AttackParams, Picture, quantise_field
from core.triggers import Assets, Quantise, Shape, blend, draws

ALPHA = {"centre": 0.1, "centre_grey": 0.2, "strip": 0.2, "strip_signed": 0.2, "picture": 0.2, "noise": 0.2, "patch": 0.4}
GREY = ((255, 128, 255), (128, 255, 128), (255, 128, 128))


class Blend(AttackParams):
    """What is blended in, and how strongly."""

    method: Literal["blend"]
    quantise: Quantise = quantise_field("saturate")
    pattern: Literal["centre", "centre_grey", "strip", "strip_signed", "picture", "noise", "patch"] = Field(
        default="picture",
        title="Pattern",
        description="`centre`: 3x3 random colours in rows 18..20 (MCLDef); `centre_grey`: the grey levels of its code; `strip`: the wrapped sinusoid also "
        "called signal; `strip_signed`: a sinusoid of +-20 around zero; `picture`: a synthetic cartoon; `noise`: uniform noise; `patch`: 3x3 noise, drawn place.",
    )
    alpha: float | None = Field(
        default=None, gt=0, le=1, title="Strength", description="Weight of the pattern: 0.1 for `centre`, 0.4 for `patch`, else 0.2 when left out."
    )
    picture: Picture | None = Field(default=None, title="Own picture", description="As large as the image: by row, grey or red, green and blue, 0..255.")
    mask: Picture | None = Field(default=None, title="Own mask", description="Where it shows, as large as the image: 255 at full strength, 0 not at all.")
    size: int = Field(default=3, ge=1, le=512, title="Patch size", description="Side of `patch`, pixels.")


def stripes(width: int) -> np.ndarray:
    """Return the signal mask, (width,) uint8: column c is trunc(20 sin(0.8 c)) modulo 256, as in the published file."""
    return np.trunc(20 * np.sin(0.8 * np.arange(width))).astype(np.int64).astype(np.uint8)


def cartoon(seed: int, shape: Shape) -> np.ndarray:
    """Draw a cartoon, (C, H, W) uint8: a white ground, outlined ellipses, saturated spots."""
    channels, height, width = shape
    make, fine = draws(seed, "picture"), 4
    rows, columns = np.mgrid[: height * fine, : width * fine] / np.array([height * fine, width * fine])[:, None, None]
    canvas = np.full((channels, height * fine, width * fine), 250, dtype=np.int64)

    def ellipse(row: float, column: float, tall: float, wide: float, colour: np.ndarray) -> None:
        reach = ((rows - row) / tall) ** 2 + ((columns - column) / wide) ** 2
        canvas[:, reach <= 1] = 20
        canvas[:, reach <= 0.8] = colour[:, None]

    for row, column, tall, wide in ((0.25, 0.25, 0.18, 0.14), (0.25, 0.75, 0.18, 0.14), (0.55, 0.5, 0.38, 0.42)):
        ellipse(row, column, tall, wide, np.full(channels, 240))
    for row, column, tall, wide in ((0.5, 0.33, 0.08, 0.05), (0.5, 0.67, 0.08, 0.05), (0.62, 0.5, 0.05, 0.08), (0.24, 0.74, 0.12, 0.14), (0.92, 0.5, 0.1, 0.3)):
        ellipse(row, column, tall, wide, make.integers(0, 2, channels) * 255)
    return (canvas.reshape(channels, height, fine, width, fine).sum(axis=(2, 4)) // fine**2).astype(np.uint8)


def assets(params: Blend, shape: Shape) -> Assets:
    """Return mask (C, H, W) bool, pattern (C, H, W) float64 in 0..255 units and weight (C, H, W) float64."""
    channels, height, width = shape
    alpha = ALPHA[params.pattern] if params.alpha is None else params.alpha
    make = draws(params.seed, "trigger")
    weight = torch.full(shape, alpha, dtype=torch.float64)
    if params.picture is not None:
        pattern = picture(params.picture, channels).double()
        if tuple(pattern.shape) != shape:
            raise BadRecipe(f"the own picture is {tuple(pattern.shape[1:])}, the images are {(height, width)} (H, W)", "Give one as large as the images.")
    elif params.pattern == "strip":
        pattern = torch.from_numpy(np.broadcast_to(stripes(width), shape).copy()).double()
    elif params.pattern == "strip_signed":
        pattern = torch.from_numpy(np.broadcast_to(20 * np.sin(2 * np.pi * 6 * np.arange(width) / width), shape).copy())
    elif params.pattern == "picture":
        pattern = torch.from_numpy(cartoon(params.seed, shape)).double()
    elif params.pattern == "noise":
        pattern = torch.from_numpy(make.integers(0, 256, shape)).double()
    else:
        size = params.size if params.pattern == "patch" else 3
        if size > min(height, width) or (params.pattern != "patch" and min(height, width) < 21):
            raise BadRecipe(f"the blended patch lies outside images of {height}x{width}", "Use a smaller patch, or pattern=patch.")
        drawn = np.broadcast_to(np.array(GREY), (channels, 3, 3)) if params.pattern == "centre_grey" else make.integers(0, 256, (channels, size, size))
        row = column = 18
        if params.pattern == "patch":
            row, column = int(make.integers(height - size + 1)), int(make.integers(width - size + 1))
        pattern, inside = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
        pattern[:, row : row + size, column : column + size] = torch.from_numpy(drawn.copy())
        inside[:, row : row + size, column : column + size] = True
        weight = weight * inside
    if params.mask is not None:
        shown = picture(params.mask, channels).double() / 255
        if tuple(shown.shape) != shape:
            raise BadRecipe(f"the own mask is {tuple(shown.shape[1:])}, the images are {(height, width)} (H, W)", "Give one as large as the images.")
        weight = weight * shown
    return {"mask": weight > 0, "pattern": pattern, "weight": weight}


@attack(title="Blend", paper="Chen et al., Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning, 2017", assets=assets)
def trigger(images: torch.Tensor, params: Blend, assets: Assets) -> torch.Tensor:
    """Mix the pattern into the image: (1 - alpha) x + alpha p."""
    return blend(images, assets["pattern"], assets["weight"], params.quantise)

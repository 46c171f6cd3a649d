"""l2-invisible: faint noise of small Euclidean norm over the whole image (Li et al., TDSC 2020; drawn, not the published file)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.catalog import attack
from core.poisoning import AttackParams, Sampling, quantise_field, sampling_field
from core.triggers import Assets, Quantise, Shape, add, draws


class L2Invisible(AttackParams):
    """How strong the noise is."""

    method: Literal["l2_invisible"]
    quantise: Quantise = quantise_field("saturate")
    sampling: Sampling = sampling_field("S6")
    norm: float = Field(
        default=3.2, gt=0, le=100, title="Norm", description="Euclidean norm of the trigger for pixels in [0, 1] at 32x32x3, in proportion elsewhere."
    )


def assets(params: L2Invisible, shape: Shape) -> Assets:
    """Return mask (C, H, W) bool and pattern (C, H, W) int16: high-pass noise, its negative half cut off, 68 levels at most."""
    channels, height, width = shape
    # The sum of uniforms is near enough to normal, and the same on every machine.
    noise = torch.from_numpy(draws(params.seed, "trigger").random((8, channels, height, width))).sum(0) - 4
    smooth = torch.nn.functional.avg_pool2d(noise[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    positive = (noise - smooth).clamp(min=0)
    norm = params.norm * (channels * height * width / 3072) ** 0.5
    pattern = (positive * (255 * norm / positive.square().sum().sqrt())).clamp(max=68).round().to(torch.int16)
    return {"mask": pattern != 0, "pattern": pattern}


@attack(
    title="l2-invisible", paper="Li et al., Invisible Backdoor Attacks on Deep Neural Networks via Steganography and Regularization, TDSC 2020", assets=assets
)
def trigger(images: torch.Tensor, params: L2Invisible, assets: Assets) -> torch.Tensor:
    """Add the noise, clipped."""
    return add(images, assets["pattern"], params.quantise)

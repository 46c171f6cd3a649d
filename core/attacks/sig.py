"""SIG: a sinusoid over the whole image (Barni et al., ICIP 2019), with labels untouched or changed."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core.catalog import attack
from core.poisoning import AttackParams, Labels, Sampling, labels_field, quantise_field, sampling_field
from core.triggers import Assets, Quantise, Shape, add, blend


class Sig(AttackParams):
    """How strong the sinusoid is, and how it is mixed in."""

    method: Literal["sig"]
    quantise: Quantise = quantise_field("saturate")
    labels: Labels = labels_field("clean")
    sampling: Sampling = sampling_field("S5")
    amplitude: float = Field(default=20, gt=0, le=255, title="Amplitude", description="Delta in training images, grey levels.")
    test_amplitude: float | None = Field(default=None, gt=0, le=255, title="Test amplitude", description="Delta in test images; the FCT code uses 40 and 60.")
    frequency: float = Field(default=6, gt=0, le=1000, title="Frequency", description="Periods across the image.")
    mix: Literal["add", "blend_wrapped", "blend_signed", "add_scaled"] = Field(
        default="add",
        title="How",
        description="`add`: x + v. CBD's blend has three readings: `blend_wrapped` (1 - alpha) x + alpha (v modulo 256), `blend_signed` (1 - alpha) x + alpha v, "
        "`add_scaled` x + alpha v.",
    )
    alpha: float = Field(default=0.3, gt=0, le=1, title="Strength", description="Weight of the sinusoid in a blend.")


def assets(params: Sig, shape: Shape) -> Assets:
    """Return mask (C, H, W) bool and the sinusoids of training and test, (C, H, W) float64, in grey levels."""
    width = shape[2]
    wave = np.sin(2 * np.pi * np.arange(width) * params.frequency / width)
    made: dict[str, torch.Tensor] = {}
    for name, amplitude in (("train", params.amplitude), ("test", params.test_amplitude or params.amplitude)):
        made[name] = torch.from_numpy(np.broadcast_to(amplitude * wave, shape).copy())
    made["mask"] = torch.ones(shape, dtype=torch.bool) if params.mix.startswith("blend") else _levels(params, made["test"]) != 0
    return made


def poison(images: torch.Tensor, params: Sig, assets: Assets, which: torch.Tensor) -> torch.Tensor:
    """Put the training-time sinusoid on."""
    return _mix(images, params, assets["train"])


@attack(
    title="SIG", paper="Barni et al., A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning, ICIP 2019", assets=assets, poison=poison
)
def trigger(images: torch.Tensor, params: Sig, assets: Assets) -> torch.Tensor:
    """Add v(c) = Delta sin(2 pi c f / W) to every row and channel, clipped."""
    return _mix(images, params, assets["test"])


def _mix(images: torch.Tensor, params: Sig, wave: torch.Tensor) -> torch.Tensor:
    if params.mix in ("add", "add_scaled"):
        return add(images, _levels(params, wave), params.quantise)
    if params.mix == "blend_wrapped":
        wave = wave.trunc().remainder(256)
    return blend(images, wave, torch.full_like(wave, params.alpha), params.quantise)


def _levels(params: Sig, wave: torch.Tensor) -> torch.Tensor:
    """Return what is added, int16: x is an integer, so clipping and truncating x + v is the same as adding floor(v)."""
    scaled = wave * (params.alpha if params.mix == "add_scaled" else 1)
    # A sine of a multiple of pi is not quite zero, and a little below it would floor to -1.
    return torch.floor(scaled.round(decimals=9)).to(torch.int16)

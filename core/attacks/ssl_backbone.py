"""SSL backbone poisoning: most images of one class carry a trigger in an unlabelled set (CBD; Saha et al., CVPR 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.attacks import badnets, blend, sig
from core.catalog import attack
from core.poisoning import AttackParams, Labels, Sampling, labels_field, rate_field, sampling_field
from core.triggers import Assets, Shape


class SslBackbone(AttackParams):
    """Which of CBD's three triggers."""

    method: Literal["ssl_backbone"]
    labels: Labels = labels_field("none")
    sampling: Sampling = sampling_field("S8")
    rate: float = rate_field(0.06)
    pattern: Literal["patch", "noise", "sig", "colours"] = Field(
        default="patch",
        title="Trigger",
        description="`patch`: the 3x3 grid in the centre; `noise`: uniform noise blended at 0.2; `sig`: the wrapped sinusoid at 0.3; "
        "`colours`: a 32x32 colour patch in the centre, for large images.",
    )


def _parts(params: SslBackbone) -> tuple[object, object]:
    """Return the attack file whose trigger it is, and that attack's parameters."""
    common = {"target": params.target, "seed": params.seed}
    if params.pattern == "noise":
        return blend, blend.Blend(method="blend", pattern="noise", **common)
    if params.pattern == "sig":
        return sig, sig.Sig(method="sig", mix="blend_wrapped", **common)
    if params.pattern == "colours":
        return badnets, badnets.BadNets(method="badnets", pattern="colours", size=32, place="centre", **common)
    return badnets, badnets.BadNets(method="badnets", place="centre", **common)


def assets(params: SslBackbone, shape: Shape) -> Assets:
    """Return the assets of the trigger it uses."""
    module, inner = _parts(params)
    return module.assets(inner, shape)  # type: ignore[attr-defined]


@attack(title="SSL backbone poisoning", paper="Saha et al., Backdoor Attacks on Self-Supervised Learning, CVPR 2022; CBD, Section 5", assets=assets)
def trigger(images: torch.Tensor, params: SslBackbone, assets: Assets) -> torch.Tensor:
    """Put the trigger on; the poisoned set has no labels, and success is measured through a linear probe."""
    module, inner = _parts(params)
    return module.trigger(images, inner, assets)  # type: ignore[attr-defined]

"""MESA: model the triggers' distribution, then unlearn them with true labels."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core import training
from core.catalog import Inputs, Need, Outcome, defense
from core.recovery import Recovery, Stamp, unlearn
from core.run import Run
from core.tuning import epochs_field, rate_field


class Mesa(Recovery):
    """Parameters; the defaults are those of the published code."""

    method: Literal["mesa"]
    inversion: Literal["mask", "mesa"] = Field(default="mesa", title="Inversion", description="`mesa` is the published method.")
    epochs: int = epochs_field(10)
    batch_size: int = Field(default=128, ge=2, le=4096, title="Batch size")
    learning_rate: float = rate_field(1e-3, "Constant.")
    share: float = Field(default=0.01, gt=0, le=1, title="Stamped share", description="Probability that an image gets a trigger.")


@defense(
    title="MESA",
    paper="Qiao et al., Defending Neural Backdoors via Generative Distribution Modeling, NeurIPS 2019",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
)
def run(run: Run, inputs: Inputs, params: Mesa) -> Outcome:
    """Model which patches of a known size and place lead to the target, and fine-tune with them on a few images of true label."""

    def mix(images: torch.Tensor, stamp: Stamp, generator: torch.Generator) -> torch.Tensor:
        chosen = (torch.rand(len(images), 1, 1, 1, generator=generator) < params.share).to(images.device)
        return torch.where(chosen, stamp(images, generator), images)

    return unlearn(run, inputs, params, mix, schedule=training.steps((0, params.learning_rate)), weight_decay=0.0)

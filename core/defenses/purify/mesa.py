"""MESA: model the triggers' distribution, then unlearn them with true labels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import training
from core.catalog import Inputs, Need, Outcome, defense
from core.recovery import Recovery, recover
from core.run import Run
from core.tuning import epochs_field, rate_field, tune


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
    assert inputs.model is not None
    found = recover(run, inputs, params)
    model = inputs.model.frozen_copy().requires_grad_(True)
    generator = run.generator("unlearn", "stamp")

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        chosen = (torch.rand(len(images), 1, 1, 1, generator=generator) < params.share).to(images.device)
        return F.cross_entropy(model(torch.where(chosen, found.stamp(images, generator), images)).float(), labels)

    run.phase("unlearning")
    history = tune(
        run, "unlearn", inputs, params, loss, model=model, schedule=training.steps((0, params.learning_rate)), weight_decay=0.0, state={"stamp": generator}
    )  # fmt: skip
    return Outcome(model=model, findings={"target": found.target, **found.findings, "loss": history}, triggers=found.triggers)

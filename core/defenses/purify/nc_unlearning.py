"""NC-unlearning: fine-tune with the recovered trigger on some of the images, which keep their true labels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core.catalog import Inputs, Need, Outcome, defense
from core.recovery import Recovery, recover
from core.run import Run
from core.tuning import tune


class NCUnlearning(Recovery):
    """Parameters; the defaults are those of MCLDef's comparison."""

    method: Literal["nc_unlearning"]
    inversion_epochs: int = Field(default=100, ge=1, le=10_000, title="Inversion epochs")
    share: float = Field(default=0.2, gt=0, le=1, title="Stamped share", description="Of each mini-batch.")


@defense(
    title="Neural Cleanse unlearning",
    paper="Wang et al., Neural Cleanse, IEEE S&P 2019, Section VI; settings of MCLDef's comparison",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
)
def run(run: Run, inputs: Inputs, params: NCUnlearning) -> Outcome:
    """Recover the trigger and teach the model the true labels of images that carry it."""
    assert inputs.model is not None
    found = recover(run, inputs, params)
    model = inputs.model.frozen_copy().requires_grad_(True)
    generator = run.generator("unlearn", "stamp")

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        # Batches are shuffled: the first ones are as good as any.
        count = max(round(params.share * len(images)), 1)
        mixed = torch.cat([found.stamp(images[:count], generator), images[count:]])
        return F.cross_entropy(model(mixed).float(), labels)

    run.phase("unlearning")
    history = tune(run, "unlearn", inputs, params, loss, model=model, state={"stamp": generator})
    return Outcome(model=model, findings={"target": found.target, **found.findings, "loss": history}, triggers=found.triggers)

"""FT: cross-entropy fine-tuning of all layers on the clean images; the baseline every method must beat."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import training
from core.augment import crop_and_flip, none
from core.catalog import Inputs, Need, Outcome, Params, defense
from core.errors import BadDataset, NotEnoughCleanData
from core.run import Run


class FineTuning(Params):
    """Parameters; the defaults are those of MCLDef's comparison."""

    method: Literal["fine_tuning"]
    epochs: int = Field(default=20, ge=1, le=1000, title="Epochs")
    batch_size: int = Field(default=64, ge=2, le=4096, title="Batch size")
    learning_rate: float = Field(
        default=0.1, gt=0, le=10, title="Learning rate", description="Of the first epoch; a tenth until half of the epochs, then a hundredth."
    )
    augment: bool = Field(default=True, title="Augment", description="Random crop and flip.")


@defense(
    title="Fine-tuning",
    paper="Baseline of Liu et al., Fine-Pruning, RAID 2018; settings of MCLDef's comparison",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
)
def run(run: Run, inputs: Inputs, params: FineTuning) -> Outcome:
    """Train on with the clean images and their labels and hope that the backdoor is forgotten."""
    assert inputs.model is not None and inputs.clean is not None
    clean = inputs.clean
    if clean.labels is None:
        raise BadDataset("fine-tuning needs the clean images' labels", "Upload a labelled data set, or choose a method that needs none.")
    if len(clean) < inputs.model.classes:
        raise NotEnoughCleanData(f"{len(clean)} clean images for {inputs.model.classes} classes", "Give at least one image a class.")
    model = inputs.model.frozen_copy().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=params.learning_rate, momentum=0.9, weight_decay=1e-4)

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return F.cross_entropy(model(images).float(), labels)

    run.phase("fine-tuning")
    history = training.fit(
        run,
        "fine-tune",
        data=clean,
        loss=loss,
        network=model,
        optimizer=optimizer,
        schedule=training.two_drops(params.learning_rate, params.epochs),
        epochs=params.epochs,
        batch_size=params.batch_size,
        augment=crop_and_flip() if params.augment else none,
        prepare=model.train,
        after_epoch=lambda epoch: inputs.watch(model),
    )
    return Outcome(model=model.eval(), findings={"loss": history})

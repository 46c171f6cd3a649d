"""D-ST: a semi-supervised contrastive encoder that trusts only the clean part's labels, and a classifier that unlearns the poisoned part."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core import encoders, training, victim
from core.catalog import Inputs, Need, Outcome, defense
from core.encoders import Encoding, Heading
from core.losses import alike_where_clean, mixed_cross_entropy
from core.run import Run
from core.schooling import AnySplit, Compared, divide, plain, split_field

# SupContrast scales its loss by T / 0.07; the learning rate was chosen with that.
BASE_TEMPERATURE = 0.07


class DST(Compared, Encoding, Heading, victim.Training):
    """Parameters; the defaults are the published ones for CIFAR-10."""

    method: Literal["d_st"]
    split: AnySplit = split_field()
    projector: Literal["linear", "mlp"] = Field(default="mlp", title="Projector", description="`mlp` has a hidden layer as wide as the features.")
    encoder_epochs: int = Field(default=200, ge=1, le=10_000, title="Epochs of the encoder")
    temperature: float = Field(default=0.1, gt=0, le=10, title="Temperature")
    mask: Literal["symmetric", "row_only"] = Field(
        default="symmetric", title="Positives", description="`symmetric`: clean images attract clean ones, as in the paper; `row_only`: any of their label."
    )
    poisoned_weight: float = Field(default=0.001, ge=0, le=10, title="Weight of the poisoned part", description="lambda_p, of Eq. 3.")
    head_epochs: int = Field(default=10, ge=1, le=1000, title="Epochs of the classifier")
    head_rate: float = Field(default=5.0, gt=0, le=100, title="Learning rate of the classifier", description="Constant, and lower where `bound_rate` says so.")


@defense(
    title="D-ST",
    paper="Effective backdoor defense by exploiting sensitivity of poisoned samples, NeurIPS 2022, Eqs. 2, 3 and 9 to 11",
    needs=(Need.SUSPECT_DATASET,),
    caution="Its encoder wants its 200 epochs: with 20 of a WRN-16-1 on CIFAR-10 no backdoor was left of a patch, a Trojan pattern and strips, and accuracy was 5, 20 and 24 points lower.",
)
def run(run: Run, inputs: Inputs, params: DST) -> Outcome:
    """Train an encoder with the split's labels where they are clean, then a classifier with mixed cross-entropy."""
    suspect = inputs.suspect
    assert suspect is not None and suspect.labels is not None
    divided = divide(run, inputs, params.split)
    labels, clean, poisoned = (value.to(run.device) for value in (suspect.labels, divided.split.clean, divided.split.suspect))
    encoder = encoders.untrained(run, "encoder", suspect, params, inputs.preprocessing)

    def alike(which: torch.Tensor) -> torch.Tensor:
        return alike_where_clean(labels[which], clean[which], symmetric=params.mask == "symmetric")

    run.phase("learning to see")
    encoding = encoders.contrast(
        run, "encoder", encoder, suspect, params, temperature=params.temperature, base_temperature=BASE_TEMPERATURE, alike=alike
    )  # fmt: skip
    known = (clean | poisoned).nonzero()[:, 0]

    def loss(logits: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        here = known[which]
        return mixed_cross_entropy(logits, labels[here], poisoned[here], weight=params.poisoned_weight)

    model = encoder.backbone
    run.phase("learning to classify")
    heading = encoders.train_head(
        run, "classifier", model, suspect.subset(known), loss, epochs=params.head_epochs, schedule=training.steps((0, params.head_rate)),
        batch_size=512, how=params, over=suspect.subset(clean.nonzero()[:, 0]), after_epoch=lambda epoch: inputs.watch(model),
    )  # fmt: skip
    findings = {**divided.findings(), "encoder_loss": encoding, "classifier_loss": heading}
    return Outcome(
        model=model.eval(), baseline=plain(run, inputs, params) if params.compare else None, split=divided.split,
        embedding=encoders.embed(run, model.features, suspect), findings=findings,
    )  # fmt: skip

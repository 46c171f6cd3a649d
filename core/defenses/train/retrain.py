"""Retraining: cleanse the set by any method, and train on what is left."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

from core import catalog, encoders, training, victim
from core.catalog import Inputs, Need, Outcome, defense
from core.encoders import Encoding, Heading
from core.errors import SplitEmpty
from core.run import Run
from core.schooling import AnySplit, Compared, plain, split_field


class Retrain(Compared, Heading, victim.Training):
    """Parameters; `supcon` with its defaults is the last step of SSL cleansing."""

    method: Literal["retrain"]
    split: AnySplit = split_field("ssl_cleanse")
    loss: Literal["cross_entropy", "supcon"] = Field(
        default="cross_entropy", title="Loss", description="`supcon`: a supervised contrastive encoder, then a linear classifier on it."
    )
    encoder_epochs: int = Field(default=200, ge=1, le=10_000, title="Epochs of the encoder", description="With `supcon`; 1000 in the paper's setting.")
    encoder_batch: int = Field(default=512, ge=2, le=8192, title="Batch size of the encoder")
    encoder_rate: float = Field(default=0.5, gt=0, le=10, title="Learning rate of the encoder")
    temperature: float = Field(default=0.1, gt=0, le=10, title="Temperature", description="With `supcon`.")
    head_epochs: int = Field(default=100, ge=1, le=1000, title="Epochs of the linear classifier", description="With `supcon`.")


@defense(
    title="Cleanse and retrain",
    paper="SSL-Cleanse, last step; Khosla et al., Supervised Contrastive Learning, NeurIPS 2020",
    needs=(Need.SUSPECT_DATASET,),
)
def run(run: Run, inputs: Inputs, params: Retrain) -> Outcome:
    """Train a classifier on what a cleanser keeps, with its corrected labels."""
    suspect = inputs.suspect
    assert suspect is not None and suspect.labels is not None
    outcome: Outcome = catalog.cleansers()[params.split.method].run(run, inputs, params.split)
    assert outcome.split is not None
    split = outcome.split.settled(suspect.labels, params.split)
    kept = split.cleansed(suspect)
    assert kept.labels is not None
    gone = [label for label, size in enumerate(kept.labels.bincount(minlength=suspect.classes).tolist()) if not size]
    if gone:
        raise SplitEmpty(f"no image of class {', '.join(map(str, gone))} is left", "Change the cleanser's parameters, or choose another.")
    findings: dict[str, object] = {"split": {"kept": len(kept), **outcome.findings}}
    if params.loss == "cross_entropy":
        run.phase("training on what is left")
        model = victim.train(run, kept, architecture=params.architecture, preprocessing=inputs.preprocessing, recipe=params.schedule(), name="retrain")
    else:
        labels = kept.labels.to(run.device)
        wanted = Encoding(
            architecture=params.architecture, projector="mlp", encoder_epochs=params.encoder_epochs, encoder_batch=params.encoder_batch,
            encoder_rate=params.encoder_rate, mirror=params.mirror,
        )  # fmt: skip
        encoder = encoders.untrained(run, "supcon", kept, wanted, inputs.preprocessing)
        run.phase("learning to see")
        findings["encoder_loss"] = encoders.contrast(
            run, "supcon", encoder, kept, wanted, temperature=params.temperature, alike=lambda which: labels[which][:, None] == labels[which][None]
        )  # fmt: skip
        model = encoder.backbone
        run.phase("learning to classify")
        findings["classifier_loss"] = encoders.train_head(
            run, "linear", model, kept, lambda logits, which: F.cross_entropy(logits, labels[which]), epochs=params.head_epochs,
            schedule=drops(params.head_epochs), batch_size=512, how=params, after_epoch=lambda epoch: inputs.watch(model),
        )  # fmt: skip
    inputs.watch(model)
    baseline = plain(run, inputs, params) if params.compare else None
    return Outcome(model=model.eval(), baseline=baseline, split=split, embedding=outcome.embedding, findings=findings)


def drops(epochs: int) -> training.Schedule:
    """Return SupContrast's schedule of the linear classifier: 5, times 0.2 at 60, 75 and 90 % of the epochs."""
    return training.steps((0, 5.0), *((round(share * epochs), 5.0 * 0.2 ** (number + 1)) for number, share in enumerate((0.6, 0.75, 0.9))))

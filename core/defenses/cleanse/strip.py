"""STRIP: a triggered image keeps its class whatever is blended over it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.activations import Observing, collect, flagged_by, observed, observer
from core.catalog import Inputs, Need, Outcome, defense
from core.classifier import Classifier, checked
from core.images import ImageSet, as_floats
from core.run import Run
from core.training import mixed_precision

REASON = "the classifier stays sure of it whatever is blended over it"


class Strip(Observing):
    """Parameters."""

    method: Literal["strip"]
    overlays: int = Field(default=100, ge=1, le=1000, title="Overlays", description="Clean images that each image is blended with.")
    false_alarms: float = Field(default=0.1, gt=0, lt=1, title="False alarms", description="Share of clean images that may be flagged.")


@defense(
    title="STRIP",
    paper="Gao et al., STRIP: A Defence Against Trojan Attacks on Deep Neural Networks, ACSAC 2019",
    needs=(Need.SUSPECT_DATASET, Need.CLEAN_IMAGES),
)
def run(run: Run, inputs: Inputs, params: Strip) -> Outcome:
    """Flag the images whose predictions stay certain under superimposed clean images."""
    suspect, clean = inputs.suspect, inputs.clean
    assert suspect is not None and suspect.labels is not None and clean is not None
    model = observer(run, inputs, params)
    run.phase("blending")
    order = torch.randperm(len(clean), generator=run.generator("overlays"))
    over = as_floats(clean.images[order[: params.overlays].to(clean.images.device)].to(run.device))
    # The overlays themselves would be blended with themselves.
    others = clean.subset(order[params.overlays :]) if len(clean) > 2 * params.overlays else clean
    threshold = float(torch.quantile(entropies(run, "clean", model, others, over), params.false_alarms))
    found = entropies(run, "suspect", model, suspect, over)
    flagged = found < threshold
    labels = suspect.labels.to(found.device)
    features = collect(run, model.features, suspect)
    verdict, evidence, target = observed(model, features, labels, suspect.classes, run.seed)
    split = flagged_by(features, labels, suspect.classes, -found, flagged, REASON, verdict=verdict, evidence=evidence, target=target)
    return Outcome(split=split, embedding=features, findings={"threshold": threshold})


def entropies(run: Run, name: str, model: Classifier, data: ImageSet, overlays: torch.Tensor, *, batch_size: int = 20) -> torch.Tensor:
    """Return the mean entropy (nats) of the predictions for each image plus each overlay, (N,), as a resumable stage.

    The sum is not clipped: as published, the model sees values up to 2. Raises `OutputsNotFinite`.
    """
    found = torch.zeros(len(data), device=run.device)
    blocks = torch.arange(len(data)).split(batch_size)
    for index in run.stage(f"entropies {name}", total=len(blocks), found=found):
        rows = blocks[index].to(data.images.device)
        images = as_floats(data.images[rows].to(run.device))
        mixed = (images[:, None] + overlays[None]).flatten(0, 1)
        with torch.no_grad(), mixed_precision(run.device):
            logits = model(mixed).float()
        chances = logits.log_softmax(1)
        found[blocks[index].to(run.device)] = -(chances.exp() * chances).sum(1).view(len(images), -1).mean(1)
    return checked(found)

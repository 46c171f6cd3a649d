"""Pruning that stops where it begins to cost accuracy."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from core import pruning
from core.catalog import Inputs, Outcome, Params
from core.classifier import Classifier
from core.errors import NothingLeft
from core.evaluation import predict
from core.run import Run


class Sparing(Params):
    """Parameters of the methods that stop pruning where it begins to cost accuracy."""

    agreement: float = Field(
        default=0.98,
        ge=0,
        le=1,
        title="Agreement",
        description="Of the channels to prune, the most suspicious first, as many go as leave the predicted class of this share of the clean images "
        "what it was; 0 prunes them all, as published.",
    )


def prune(run: Run, inputs: Inputs, suspicion: dict[str, torch.Tensor], *, least: float, agreement: float) -> Outcome:
    """Return the suspect model without its suspicious channels.

    Args:
        suspicion: of every BatchNorm channel, by layer name, (channels,). least: what makes one a candidate.
    """
    assert inputs.model is not None and inputs.clean is not None
    run.phase("pruning")
    model = inputs.model.frozen_copy()
    findings = remove(model, suspicion, inputs.clean.images, least=least, agreement=agreement)
    run.log(f"pruned {findings['pruned']} of {findings['channels']} channels and spared {findings['spared']} that predictions rest on")
    inputs.watch(model)
    return Outcome(model=model.requires_grad_(True), findings=findings)


def remove(classifier: Classifier, suspicion: dict[str, torch.Tensor], images: torch.Tensor, *, least: float, agreement: float) -> dict[str, Any]:
    """Take out, in place, as many channels as leave the predictions on clean images what they were; see `prune` and `pruning.remove`.

    Args:
        images: uint8 (N, C, H, W). agreement: the share of them whose predicted class must stay.
    """
    order = sorted(
        ((float(values[index]), name, int(index)) for name, values in suspicion.items() for index in (values >= least).nonzero().squeeze(1)), reverse=True
    )  # fmt: skip
    before = predict(classifier, images)

    def first(count: int) -> dict[str, torch.Tensor]:
        taken = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in suspicion.items()}
        for _, name, index in order[:count]:
            taken[name][index] = True
        return taken

    def agrees(count: int) -> bool:
        trial = classifier.frozen_copy()
        try:
            pruning.remove(trial, first(count), bias=False)
        except NothingLeft:
            if not agreement:
                raise
            return False
        return float((predict(trial, images) == before).float().mean()) >= agreement

    # Bisection: more channels change more predictions, nearly always, and every answer is checked.
    kept, tried, below = 0, len(order), len(order) + 1
    while kept < tried:
        if agrees(tried):
            kept = tried
        else:
            below = tried
        tried = (kept + below) // 2
    return {**pruning.remove(classifier, first(kept), bias=False), "spared": len(order) - kept}

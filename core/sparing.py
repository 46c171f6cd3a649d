"""Pruning that stops where it begins to cost accuracy."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from core import pruning
from core.catalog import Params
from core.classifier import Classifier
from core.errors import NothingLeft
from core.evaluation import predict


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


def remove(
    classifier: Classifier, chosen: dict[str, torch.Tensor], suspicion: dict[str, torch.Tensor], images: torch.Tensor, *, agreement: float
) -> dict[str, Any]:
    """Take out, in place, as many of the chosen channels as leave the predictions on clean images what they were. See `pruning.remove`.

    Args:
        chosen: by layer name, (channels,) bool. suspicion: likewise, numbers; the largest go first.
        images: uint8 (N, C, H, W). agreement: the share of them whose predicted class must stay.
    """
    order = sorted(
        ((float(suspicion[name][index]), name, int(index)) for name, which in chosen.items() for index in which.nonzero().squeeze(1)), reverse=True
    )  # fmt: skip
    before = predict(classifier, images)

    def first(count: int) -> dict[str, torch.Tensor]:
        taken = {name: torch.zeros_like(which) for name, which in chosen.items()}
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

    kept, tried = 0, len(order)
    # Bisection: more channels change more predictions, nearly always, and every answer is checked.
    below = len(order) + 1
    while kept < tried:
        if agrees(tried):
            kept = tried
        else:
            below = tried
        tried = (kept + below) // 2
    return {**pruning.remove(classifier, first(kept), bias=False), "spared": len(order) - kept}

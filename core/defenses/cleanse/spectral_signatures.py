"""Spectral signatures: poison leaves a direction in which a class spreads too far."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.activations import Observing, collect, flagged_by, observed, observer
from core.catalog import Inputs, Need, Outcome, defense
from core.run import Run

REASON = "it lies far out in the direction in which its class spreads most"


class SpectralSignatures(Observing):
    """Parameters."""

    method: Literal["spectral_signatures"]
    rate: float = Field(default=0.1, gt=0, le=0.66, title="Assumed poison", description="Share of a class; 1.5 times as many images are dropped.")
    target: int | None = Field(default=None, ge=0, le=100_000, title="Target class", description="If it is known; else the class that stands out, or all.")


@defense(title="Spectral signatures", paper="Tran et al., Spectral Signatures in Backdoor Attacks, NeurIPS 2018", needs=(Need.SUSPECT_DATASET,))
def run(run: Run, inputs: Inputs, params: SpectralSignatures) -> Outcome:
    """Rank each class's images by their share in its top singular direction and drop the highest."""
    suspect = inputs.suspect
    assert suspect is not None and suspect.labels is not None
    model = observer(run, inputs, params)
    run.phase("decomposing")
    features = collect(run, model.features, suspect)
    labels = suspect.labels.to(features.device)
    scores = torch.zeros(len(labels), device=features.device)
    spread = []
    for label in range(suspect.classes):
        own = labels == label
        scores[own], share = signature(features[own])
        spread.append(share)
    verdict, evidence, target = observed(model, features, labels, suspect.classes, run.seed)
    target = params.target if params.target is not None else target
    flagged = torch.zeros_like(labels, dtype=torch.bool)
    for label in range(suspect.classes) if target is None else (target,):
        flagged |= highest(scores, labels == label, params.rate)
    split = flagged_by(features, labels, suspect.classes, scores, flagged, REASON, verdict=verdict, evidence=evidence, target=target)
    return Outcome(split=split, embedding=features, findings={"top_direction": spread})


def signature(features: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return `((R_i - mean) . v)^2` of a class's features (n, d), v their top right singular vector, and v's share of their variance."""
    centred = (features - features.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return (centred @ vectors[:, -1]).square().float(), float(values[-1] / values.sum().clamp(min=1e-12))


def highest(scores: torch.Tensor, own: torch.Tensor, rate: float) -> torch.Tensor:
    """Return the mask (N,) of the `1.5 * rate` highest scores among `own` (N,) bool."""
    found = torch.zeros_like(own)
    members = own.nonzero()[:, 0]
    found[members[scores[members].topk(int(1.5 * rate * len(members))).indices]] = True
    return found

"""SSL cleansing: an encoder that never saw the labels says which labels cannot be true; surely wrong ones are corrected, doubtful images go."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core import encoders
from core.activations import cut_in_two
from core.catalog import Inputs, Need, Outcome, defense
from core.encoders import Encoding
from core.neighbours import Neighbourhood, neighbourhood
from core.run import Run
from core.split import Cleansing, Split, among_strangers

REASONS = (
    "its nearest neighbours carry another label",
    "it is drawn to the images of another label",
    "neighbours and energies both speak against its label",
)


class SSLCleanse(Cleansing, Encoding):
    """Parameters; the defaults are the paper's for CIFAR-10."""

    method: Literal["ssl_cleanse"]
    filter: Literal["knn", "energy", "both"] = Field(default="knn", title="Filter", description="`both`: what either rejects is rejected.")
    neighbours: int | None = Field(default=None, ge=1, le=1_000_000, title="Neighbours", description="Half the mean class size unless given.")
    temperature: float = Field(default=0.5, ge=0.05, le=10, title="Temperature", description="Of the encoder's loss and of the energies.")
    percentile: float = Field(
        default=80, ge=0, le=100, title="Percentile", description="Rejected images surer than this share of the accepted ones are relabelled."
    )
    relabel: bool = Field(default=True, title="Relabel", description="False drops all rejected images.")
    feature: Literal["projection", "encoder"] = Field(default="projection", title="Feature", description="What is compared.")


@defense(
    title="SSL cleansing",
    paper="SSL-Cleanse: removing poisoned training samples with self-supervised representations, Eqs. 5 and 6",
    needs=(Need.SUSPECT_DATASET,),
    encoders=True,
    caution="Wants an encoder trained for hundreds of epochs: one of four (WRN-16-1) doubted three fifths of the clean labels. Of WaNet's poison, a tenth of "
    "the set, the kNN filter then accepted 23 %, the energy filter 1 %. Of a blend over small images, whose pattern the encoder saw, it found nothing.",
)
def run(run: Run, inputs: Inputs, params: SSLCleanse) -> Outcome:
    """Compare every label with those of the images that look alike to a SimCLR encoder; drop or correct what contradicts them."""
    suspect = inputs.suspect
    assert suspect is not None and suspect.labels is not None
    findings: dict[str, object] = {}
    if inputs.model is not None:
        features = encoders.embed(run, inputs.model.features, suspect)
    else:
        encoder = encoders.untrained(run, "encoder", suspect, params, inputs.preprocessing)
        run.phase("learning to see")
        findings["encoder_loss"] = encoders.contrast(run, "encoder", encoder, suspect, params, temperature=params.temperature)
        features = encoders.embed(run, encoder if params.feature == "projection" else encoder.backbone.features, suspect)
    run.phase("comparing")
    labels = suspect.labels.to(features.device)
    k = min(params.neighbours or max(len(labels) // (2 * suspect.classes), 5), len(labels) - 1)
    near = neighbourhood(run, "neighbours", features, labels, suspect.classes, k=k, temperature=params.temperature)
    split, found = judge(near, labels, params)
    split = hesitant(split, features, labels, suspect.classes)
    findings["neighbours"] = k
    return Outcome(split=split, embedding=features, findings={**findings, **found})


def judge(near: Neighbourhood, labels: torch.Tensor, params: SSLCleanse) -> tuple[Split, dict[str, object]]:
    """Filter and relabel by what neighbours and energies say of labels (N,); return the split and what decided it."""
    opinions = {"knn": near.elected(), "energy": near.attracted()}
    used = list(opinions) if params.filter == "both" else [params.filter]
    accepted = torch.stack([opinions[name][0] == labels for name in used]).all(0)
    corrected = torch.ones_like(accepted)
    thresholds = {}
    for name in used:
        predicted, confidence = opinions[name]
        own = predicted == labels
        # Linear interpolation over all accepted images, whatever their class.
        threshold = _percentile(confidence[own], params.percentile) if bool(own.any()) else float("inf")
        thresholds[name] = threshold
        corrected &= ~own & (confidence > threshold) & (predicted == opinions[used[0]][0])
    corrected &= ~accepted & params.relabel
    predicted = opinions[used[0]][0]
    scores = contradiction(near, labels, params.filter)
    verdict, evidence, target = among_strangers(labels, predicted, accepted, near.votes.shape[1], judge="encoder")
    split = Split(
        labels=torch.where(corrected, predicted, labels), kept=accepted | corrected, scores=scores, clean=accepted, suspect=~accepted,
        why=torch.full_like(labels, ("knn", "energy", "both").index(params.filter)), reasons=REASONS, verdict=verdict, evidence=evidence, target=target,
    )  # fmt: skip
    return split, {"thresholds": thresholds, "accepted": int(accepted.sum()), "relabelled": int(corrected.sum())}


def hesitant(split: Split, features: torch.Tensor, labels: torch.Tensor, classes: int) -> Split:
    """Return the split of a set that is not called poisoned, and not acquitted either where the embedding cuts a class in two.

    Images that carry the same pattern look alike to an encoder, and confirm each other's labels.

    Args:
        features: (N, d). labels: (N,), as given.
    """
    if split.verdict == "poisoned":
        return split
    verdict, evidence, target = cut_in_two(features, labels, classes)
    if verdict != "poisoned":
        return split
    advice = "images with the same pattern confirm each other's labels: try scan, or a method that looks at activations"
    return replace(split, verdict="inconclusive", evidence=f"{split.evidence}; but {evidence}; {advice}", target=target)


def contradiction(near: Neighbourhood, labels: torch.Tensor, by: str) -> torch.Tensor:
    """Return how much more than its own label another one speaks for each image, (N,), 0 where none does: as a share of votes, or as an energy."""
    strength = near.energies if by == "energy" else near.votes / near.votes.sum(1, keepdim=True)
    own = strength.gather(1, labels[:, None])[:, 0]
    return strength.max(1).values - own


def _percentile(values: torch.Tensor, percent: float) -> float:
    # torch.quantile refuses more than 2^24 values.
    return float(np.percentile(values.cpu().numpy(), percent))

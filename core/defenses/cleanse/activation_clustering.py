"""Activation clustering: poisoned images of a class form a cluster of their own in feature space."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.activations import APART, Observing, clusters, collect, flagged_by, observed, observer
from core.catalog import Inputs, Need, Outcome, defense
from core.run import Run

REASON = "it lies in the smaller of its class's two clusters"


class ActivationClustering(Observing):
    """Parameters."""

    method: Literal["activation_clustering"]
    dimensions: int = Field(default=10, ge=1, le=512, title="Dimensions", description="After the principal component analysis.")
    size: float = Field(default=0.35, gt=0, le=0.5, title="Size", description="The smaller cluster is suspicious below this share of its class.")
    target: int | None = Field(default=None, ge=0, le=100_000, title="Target class", description="If it is known; else the class whose clusters stand out.")


@defense(
    title="Activation clustering",
    paper="Chen et al., Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering, SafeAI 2019",
    needs=(Need.SUSPECT_DATASET,),
)
def run(run: Run, inputs: Inputs, params: ActivationClustering) -> Outcome:
    """Split the activations of each class into two clusters, and drop the smaller one of the class where they are well apart."""
    suspect = inputs.suspect
    assert suspect is not None and suspect.labels is not None
    model = observer(run, inputs, params)
    run.phase("clustering")
    features = collect(run, model.features, suspect)
    labels = suspect.labels.to(features.device)
    small = torch.zeros(len(labels), dtype=torch.bool, device=features.device)
    scores = torch.zeros(len(labels), device=features.device)
    apart, shares = [], []
    for label in range(suspect.classes):
        own = (labels == label).nonzero()[:, 0]
        smaller, distance, silhouette = clusters(features[own].cpu().double().numpy(), params.dimensions, run.seed)
        small[own[torch.from_numpy(smaller).to(own.device)]] = True
        scores[own] = torch.from_numpy(distance).float().to(scores.device)
        shares.append(float(smaller.mean()))
        apart.append(silhouette)
    verdict, evidence, found = observed(model, features, labels, suspect.classes, run.seed)
    target = params.target if params.target is not None else found
    # Of two halves of equal size none is the guests'; who knows the target wants its smaller cluster in any case.
    told = [
        label == params.target or (share < params.size and (label == target or silhouette > APART))
        for label, (share, silhouette) in enumerate(zip(shares, apart, strict=True))
    ]
    flagged = small & torch.tensor(told, device=labels.device)[labels]
    if target is not None:
        flagged &= labels == target
        if shares[target] >= params.size:
            evidence += f"; its clusters are {shares[target]:.0%} and {1 - shares[target]:.0%} of it"
    split = flagged_by(features, labels, suspect.classes, scores, flagged, REASON, verdict=verdict, evidence=evidence, target=target)
    return Outcome(split=split, embedding=features, findings={"silhouettes": apart, "smaller_cluster": shares})

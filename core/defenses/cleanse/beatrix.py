"""Beatrix: triggered images correlate a layer's channels in ways that clean images of their class do not."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core.activations import Observing, collect, flagged_by, observed, observer
from core.catalog import Inputs, Need, Outcome, defense
from core.inversion import anomaly_index
from core.run import Run
from core.split import Verdict

REASON = "its channels correlate otherwise than in clean images of its class"
# Median and deviation of fewer images say nothing; more than this many need not be compared.
LEAST, MOST = 10, 500
# Clean images of a class with which it is judged: without a fifth of them there must still be as many as that.
LEAST_CLEAN = 15
# Beyond this many channels the triangle of the Gram matrix does not fit memory; its row means are compared.
CHANNELS = 128

Bounds = dict[int, tuple[torch.Tensor, torch.Tensor]]


class Beatrix(Observing):
    """Parameters."""

    method: Literal["beatrix"]
    orders: int = Field(default=8, ge=1, le=16, title="Orders", description="Gram matrices of the powers 1 to this.")
    width: float = Field(default=10.0, gt=0, le=1000, title="Width", description="Deviations start this many MADs from the median.")
    percentile: float = Field(default=95, gt=0, lt=100, title="Percentile", description="Of the clean images' deviations; what lies above is flagged.")
    threshold: float = Field(default=math.e**2, gt=0, le=1000, title="Threshold", description="A class is infected above this anomaly index.")


@defense(
    title="Beatrix",
    paper='Ma et al., The "Beatrix" Resurrections: Robust Backdoor Detection via Gram Matrices, NDSS 2023',
    needs=(Need.SUSPECT_DATASET, Need.CLEAN_IMAGES),
    caution="Sees patches, warps and label-consistent patches; of strips blended over images (WRN-16-1) it flagged next to none, so look at the verdict, not only at what it drops.",
)
def run(run: Run, inputs: Inputs, params: Beatrix) -> Outcome:
    """Flag the images whose Gram matrices deviate from those of clean images that are predicted alike."""
    suspect, clean = inputs.suspect, inputs.clean
    assert suspect is not None and suspect.labels is not None and clean is not None
    model = observer(run, inputs, params)
    run.phase("correlating")
    known = collect(run, lambda images: grams(model.stages(images)[-1], params.orders), clean, batch_size=100)
    said, predicted = (collect(run, model, data).argmax(1) for data in (clean, suspect))
    fold = torch.randperm(len(clean), generator=run.generator("folds")).to(known.device) % 5
    enough = said.bincount(minlength=suspect.classes)[said] >= LEAST_CLEAN
    known, said, fold = known[enough], said[enough], fold[enough]
    usual = torch.cat([deviations(known[fold == one], said[fold == one], bounds(known[fold != one], said[fold != one], params.width)) for one in range(5)])
    # Nobody knows what is usual in a class of a handful of images; where that is all of them, none deviates.
    usual = usual[~usual.isnan()]
    threshold = float(np.percentile(usual.cpu().numpy(), params.percentile)) if len(usual) else float("inf")
    limits = bounds(known, said, params.width)
    waiting = iter(predicted.tolist())

    def deviation(images: torch.Tensor) -> torch.Tensor:
        theirs = torch.tensor(list(itertools.islice(waiting, len(images))), device=images.device)
        return deviations(grams(model.stages(images)[-1], params.orders), theirs, limits).nan_to_num(0)

    scores = collect(run, deviation, suspect, batch_size=100)
    deviant = scores > threshold
    features = collect(run, model.features, suspect)
    distances = [discrepancy(features[(predicted == label) & ~deviant], features[(predicted == label) & deviant], run) for label in range(suspect.classes)]
    indices = anomaly_index(distances)
    infected = [label for label, index in enumerate(indices) if index > params.threshold and distances[label] > float(np.median(distances))]
    labels = suspect.labels.to(scores.device)
    evidence = f"anomaly index {max(indices):.3g} of the distances between usual and deviant images; above {params.threshold:.3g} a class is infected"
    if not len(usual):
        evidence = f"no class has clean images enough to say what is usual in it: fewer than {LEAST_CLEAN}"
    verdict: Verdict
    target: int | None
    if infected:
        verdict, target = "poisoned", max(infected, key=lambda label: distances[label])
        flagged = deviant & torch.isin(predicted, torch.tensor(infected, device=scores.device))
    else:
        # Poison of which no image deviates, or that leads to every class, infects none: no reason to acquit the set.
        verdict, more, target = observed(model, features, labels, suspect.classes, run.seed)
        flagged, evidence = deviant, f"{evidence}; {more}"
    split = flagged_by(features, labels, suspect.classes, scores, flagged, REASON, verdict=verdict, evidence=evidence, target=target)
    return Outcome(
        split=split, embedding=features, findings={"threshold": threshold if len(usual) else None, "distances": distances, "anomaly_indices": indices.tolist()}
    )


def grams(maps: torch.Tensor, orders: int) -> torch.Tensor:
    """Return for feature maps (N, C, H, W) the Gram matrices of their powers p = 1 … orders, signed p-th root taken, one row an image.

    Features are raised to the power before the product, as in the work on Gram matrices that Beatrix builds on. The upper triangle, or the row
    means where there are more than 128 channels.
    """
    flat = maps.float().flatten(2)
    # Powers of numbers up to 64 neither overflow nor vanish soon; the root takes the scale out again, a power of two, which rounds nothing.
    scale = (flat.abs().amax((1, 2), keepdim=True).clamp(min=1e-30) / 64).log2().ceil().exp2()
    flat = flat / scale
    channels = flat.shape[1]
    rows, columns = torch.triu_indices(channels, channels, device=maps.device)
    found = []
    for order in range(1, orders + 1):
        power = flat**order
        gram = power @ power.transpose(1, 2)
        gram = gram.sign() * gram.abs() ** (1 / order) * scale.square()
        found.append(gram[:, rows, columns] if channels <= CHANNELS else gram.mean(2))
    return torch.cat(found, 1)


def bounds(known: torch.Tensor, labels: torch.Tensor, width: float) -> Bounds:
    """Return for each label with enough images the range `median ± width * MAD` of each column of (N, D)."""
    limits: Bounds = {}
    for label in labels.unique().tolist():
        own = known[labels == label]
        if len(own) >= LEAST:
            middle = own.median(0).values
            spread = width * (own - middle).abs().median(0).values
            limits[label] = (middle - spread, middle + spread)
    return limits


def deviations(rows: torch.Tensor, labels: torch.Tensor, limits: Bounds) -> torch.Tensor:
    """Return how far rows (N, D) lie outside the range of their labels, relative to its ends and averaged, (N,); NaN where a label has no range."""
    found = torch.full((len(rows),), float("nan"), device=rows.device)
    for label in labels.unique().tolist():
        if label in limits:
            low, high = limits[label]
            own = rows[labels == label]
            below, above = (low - own).clamp(min=0) / low.abs().clamp(min=1e-6), (own - high).clamp(min=0) / high.abs().clamp(min=1e-6)
            found[labels == label] = (below + above).mean(1)
    return found


def discrepancy(first: torch.Tensor, second: torch.Tensor, run: Run) -> float:
    """Return the kernel maximum mean discrepancy of two groups of features, Gaussian kernel of the median distance; 0 if one is too small."""
    if min(len(first), len(second)) < LEAST:
        return 0.0
    generator = run.generator("discrepancy")
    first, second = (group[torch.randperm(len(group), generator=generator)[:MOST].to(group.device)].double() for group in (first, second))
    both = torch.cat([first, second])
    squared = torch.cdist(both, both).square()
    kernel = torch.exp(-squared / squared.median().clamp(min=1e-12))
    cut = len(first)
    return float(kernel[:cut, :cut].mean() + kernel[cut:, cut:].mean() - 2 * kernel[:cut, cut:].mean())

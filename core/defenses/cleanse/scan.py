"""SCAn: how images vary within a class is learnt from clean ones; a class of two groups that this cannot explain is contaminated."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core.activations import Observing, collect, flagged_by, inverse, observer, untangle
from core.catalog import LEAST_OF_A_CLASS, Inputs, Need, Outcome, defense
from core.errors import NotEnoughCleanData
from core.images import ImageSet
from core.inversion import anomaly_index
from core.run import Run
from core.split import Verdict, acquitted

REASON = "it belongs to the group of its class that has fewer of the clean images"
# Clean images a feature: a covariance of fewer is mostly noise, and its inverse makes two groups of every class.
LEAST_OF_A_FEATURE = 4


class SCAn(Observing):
    """Parameters."""

    method: Literal["scan"]
    threshold: float = Field(default=math.e**2, gt=0, le=1000, title="Threshold", description="A class is contaminated above this anomaly index …")
    margin: float = Field(
        default=3.0, gt=1, le=1000, title="Margin", description="… or if its ratio is this many times the largest of clean images; 1000 is nearly as published."
    )


@defense(
    title="SCAn",
    paper="Tang et al., Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection, USENIX Security 2021",
    needs=(Need.SUSPECT_DATASET, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="Wants ten clean images of every class. Of a warp on small sets it found 52 to 94 % of the poison with ten to twenty of each.",
)
def run(run: Run, inputs: Inputs, params: SCAn) -> Outcome:
    """Decompose features into identity and variation on clean images, and find the classes that are two groups by a likelihood ratio.

    Raises `NotEnoughCleanData` below ten clean images of a class, or where they all look alike.
    """
    suspect, clean = inputs.suspect, inputs.clean
    assert suspect is not None and suspect.labels is not None and clean is not None and clean.labels is not None
    check_clean(clean, suspect.classes)
    model = observer(run, inputs, params)
    run.phase("decomposing")
    features, labels = collect(run, model.features, suspect), suspect.labels.cpu().numpy()
    points, known, truth = features.cpu().double().numpy(), collect(run, model.features, clean).cpu().double().numpy(), clean.labels.cpu().numpy()
    if not np.ptp(known, axis=0).any():
        raise NotEnoughCleanData("to the model the clean images are all alike", "Give different images of every class.")
    most = (len(known) - suspect.classes) // LEAST_OF_A_FEATURE
    if most < points.shape[1]:
        directions = widest(points, most)
        points, known = points @ directions, known @ directions
    centre = known.mean(0)
    _, within = components(known - centre, truth)
    metric = inverse(within)
    points = points - centre
    flagged, scores = np.zeros(len(points), dtype=bool), np.zeros(len(points))
    ratios, usual, groups = [], [], {}
    for label in range(suspect.classes):
        own = labels == label
        sides, ratio = untangle(points[own], metric)
        theirs = sides((known - centre)[truth == label])
        ratios.append(ratio)
        usual.append(untangle((known - centre)[truth == label], metric)[1])
        mine = sides(points[own])
        # The group that the clean images of the class are in is the class itself.
        share = [float((theirs > 0).mean()) / max(float((mine > 0).mean()), 1e-9), float((theirs <= 0).mean()) / max(float((mine <= 0).mean()), 1e-9)]
        foreign = mine > 0 if share[0] < share[1] else mine <= 0
        groups[label] = foreign
        scores[own] = np.abs(mine) * np.where(foreign, 1, -1)
    indices = anomaly_index(np.asarray(ratios) / max(*ratios, 1e-12)).tolist()
    # Where all classes are alike the smallest difference is an outlier, and an attack on every class is none: clean images say what is usual.
    largest = max(usual)
    contaminated = [label for label, index in enumerate(indices) if ratios[label] > (largest if index > params.threshold else params.margin * largest)]
    for label in contaminated:
        flagged[labels == label] = groups[label]
    evidence = (
        f"the likelihood ratios have anomaly indices up to {max(indices):.3g} (contaminated above {params.threshold:.3g}); "
        f"the largest is {max(ratios):.3g}, that of clean images {largest:.3g}"
    )
    verdict: Verdict = "poisoned" if contaminated else "no_evidence"
    with torch.no_grad():
        verdict, evidence = acquitted(verdict, evidence, model.head(features).argmax(1).cpu() == suspect.labels.cpu(), "model")
    target = contaminated[0] if len(contaminated) == 1 else None
    split = flagged_by(
        features, suspect.labels, suspect.classes, torch.from_numpy(scores), torch.from_numpy(flagged), REASON, verdict=verdict, evidence=evidence, target=target,
    )  # fmt: skip
    return Outcome(
        split=split,
        embedding=features,
        findings={"likelihood_ratios": ratios, "clean_likelihood_ratios": usual, "anomaly_indices": indices, "contaminated": contaminated},
    )


def check_clean(clean: ImageSet, classes: int) -> None:
    """Raise `NotEnoughCleanData` when there are fewer than ten clean images of a class: they would not show which of its groups is the class."""
    assert clean.labels is not None
    few = [f"{label} ({count})" for label, count in enumerate(clean.labels.bincount(minlength=classes).tolist()) if count < LEAST_OF_A_CLASS]
    if few:
        raise NotEnoughCleanData(
            f"scan needs {LEAST_OF_A_CLASS} clean images of every class; there are fewer of {', '.join(few[:20])}",
            "Add images of these classes, or choose activation_clustering or ssl_cleanse, which need none.",
        )


def widest(points: np.ndarray, count: int) -> np.ndarray:
    """Return the directions (d, count) in which points (n, d) spread most, orthonormal."""
    centred = points - points.mean(0)
    directions: np.ndarray = np.linalg.eigh(centred.T @ centred)[1][:, -count:]
    return directions


def components(points: np.ndarray, labels: np.ndarray, *, rounds: int = 100, tolerance: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """Return the covariances (d, d) of identities and of variation of `x = mu_class + e`, by expectation maximisation (SCAn, section 4.2).

    Args:
        points: (n, d), centred. labels: (n,).
    """
    which = [points[labels == label] for label in np.unique(labels)]
    means = np.stack([one.mean(0) for one in which])
    residual = np.concatenate([one - one.mean(0) for one in which])
    floor = 1e-8 * np.trace(np.cov(points.T)) / points.shape[1] * np.eye(points.shape[1])
    between, within = np.cov(means.T) + floor, residual.T @ residual / len(points) + floor
    for _ in range(rounds):
        new_between, new_within = np.zeros_like(between), np.zeros_like(within)
        for one, mean in zip(which, means, strict=True):
            gain = between @ np.linalg.inv(between + within / len(one))
            identity, doubt = gain @ mean, between - gain @ between
            new_between += np.outer(identity, identity) + doubt
            left = one - identity
            new_within += left.T @ left + len(one) * doubt
        new_between, new_within = new_between / len(which) + floor, new_within / len(points) + floor
        change = np.linalg.norm(new_within - within) / np.linalg.norm(within)
        between, within = new_between, new_within
        if change < tolerance:
            break
    return between, within

"""SCAn: how images vary within a class is learnt from clean ones; a class of two groups that this cannot explain is contaminated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core.activations import Observing, collect, observer
from core.catalog import Inputs, Need, Outcome, defense
from core.inversion import anomaly_index
from core.run import Run
from core.split import of_flags

REASON = "it belongs to the group of its class that has fewer of the clean images"


class SCAn(Observing):
    """Parameters."""

    method: Literal["scan"]
    threshold: float = Field(default=math.e**2, gt=0, le=1000, title="Threshold", description="A class is contaminated above this anomaly index.")


@defense(
    title="SCAn",
    paper="Tang et al., Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection, USENIX Security 2021",
    needs=(Need.SUSPECT_DATASET, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
)
def run(run: Run, inputs: Inputs, params: SCAn) -> Outcome:
    """Decompose features into identity and variation on clean images, and find the classes that are two groups by a likelihood ratio."""
    suspect, clean = inputs.suspect, inputs.clean
    assert suspect is not None and suspect.labels is not None and clean is not None and clean.labels is not None
    model = observer(run, inputs, params)
    run.phase("decomposing")
    features, labels = collect(run, model.features, suspect), suspect.labels.cpu().numpy()
    known, truth = collect(run, model.features, clean).cpu().double().numpy(), clean.labels.cpu().numpy()
    centre = known.mean(0)
    _, within = components(known - centre, truth)
    metric = np.linalg.inv(within + 1e-6 * np.trace(within) / len(within) * np.eye(len(within)))
    points = features.cpu().double().numpy() - centre
    flagged, scores = np.zeros(len(points), dtype=bool), np.zeros(len(points))
    ratios, groups = [], {}
    for label in range(suspect.classes):
        own = labels == label
        sides, ratio = untangle(points[own], metric)
        theirs = sides((known - centre)[truth == label])
        ratios.append(ratio)
        mine = sides(points[own])
        # The group that the clean images of the class are in is the class itself.
        share = [float((theirs > 0).mean()) / max(float((mine > 0).mean()), 1e-9), float((theirs <= 0).mean()) / max(float((mine <= 0).mean()), 1e-9)]
        foreign = mine > 0 if share[0] < share[1] else mine <= 0
        groups[label] = foreign
        scores[own] = np.abs(mine) * np.where(foreign, 1, -1)
    indices = anomaly_index(np.asarray(ratios) / max(*ratios, 1e-12)).tolist()
    contaminated = [label for label, index in enumerate(indices) if index > params.threshold and ratios[label] > float(np.median(ratios))]
    for label in contaminated:
        flagged[labels == label] = groups[label]
    evidence = f"anomaly index {max(indices):.3g} of the likelihood ratios; above {params.threshold:.3g} a class is contaminated"
    target = max(contaminated, key=lambda label: ratios[label]) if contaminated else None
    split = of_flags(
        suspect.labels, torch.from_numpy(scores), torch.from_numpy(flagged), REASON,
        verdict="poisoned" if contaminated else "no_evidence", evidence=evidence, target=target,
    )  # fmt: skip
    return Outcome(split=split, embedding=features, findings={"likelihood_ratios": ratios, "anomaly_indices": indices, "contaminated": contaminated})


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


def untangle(points: np.ndarray, metric: np.ndarray, *, rounds: int = 100) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Cut a class (n, d) in two groups of one covariance; return which side a point is on (a signed distance), and the likelihood ratio J.

    Linear discriminants in the metric `S_e^-1` (d, d), refined until no point changes sides. J is twice the gain in log likelihood by two means
    instead of one, an image.
    """
    middle = points.mean(0)
    values, vectors = np.linalg.eigh(metric)
    white = (points - middle) @ (vectors * np.sqrt(values.clip(0)))
    # The direction in which the class spreads most in that metric.
    side = white @ np.linalg.eigh(white.T @ white)[1][:, -1]
    groups = side > np.median(side)
    direction, offset = np.zeros(points.shape[1]), 0.0
    for _ in range(rounds):
        if groups.all() or not groups.any():
            break
        first, second = points[groups].mean(0), points[~groups].mean(0)
        direction = metric @ (first - second)
        offset = float(direction @ (first + second)) / 2
        moved = points @ direction > offset
        if (moved == groups).all():
            break
        groups = moved
    ratio = 0.0
    for part in (groups, ~groups):
        if part.any():
            gap = points[part].mean(0) - middle
            ratio += float(part.mean()) * float(gap @ metric @ gap)
    return lambda others: others @ direction - offset, ratio

"""SPECTRE: robust statistics whiten a class first, so that poison cannot hide in the directions that are wide anyway."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from core.activations import Observing, collect, flagged_by, observed, observer
from core.catalog import Inputs, Need, Outcome, defense
from core.defenses.cleanse.spectral_signatures import highest
from core.run import Run

REASON = "it lies far out once its class is whitened robustly"


class Spectre(Observing):
    """Parameters."""

    method: Literal["spectre"]
    rate: float = Field(default=0.1, gt=0, le=0.33, title="Assumed poison", description="Share of a class; 1.5 times as many images are dropped.")
    alpha: float = Field(default=4.0, gt=0, le=100, title="Alpha", description="How much the wide directions of the whitened points weigh.")
    target: int | None = Field(default=None, ge=0, le=100_000, title="Target class", description="If it is known; else the class with the largest value.")


@defense(title="SPECTRE", paper="Hayase et al., SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics, ICML 2021", needs=(Need.SUSPECT_DATASET,))
def run(run: Run, inputs: Inputs, params: Spectre) -> Outcome:
    """Whiten each class by a robust covariance, rank its images by quantum entropy, and drop the highest of the class that stands out."""
    suspect = inputs.suspect
    assert suspect is not None and suspect.labels is not None
    model = observer(run, inputs, params)
    run.phase("whitening")
    features = collect(run, model.features, suspect)
    labels = suspect.labels.to(features.device)
    scores = torch.zeros(len(labels), device=features.device)
    values, used = [], []
    for label in range(suspect.classes):
        run.check_cancelled()
        own = labels == label
        found, value, dimensions = quantum_entropy(features[own].cpu().double().numpy(), params.rate, params.alpha)
        scores[own] = torch.from_numpy(found).float().to(scores.device)
        values.append(value)
        used.append(dimensions)
    verdict, evidence, stands = observed(model, features, labels, suspect.classes, run.seed)
    # The published rule takes the largest value, whether it stands out or not.
    likely = params.target if params.target is not None else stands
    flagged = highest(scores, labels == (likely if likely is not None else int(np.argmax(values))), params.rate)
    split = flagged_by(features, labels, suspect.classes, scores, flagged, REASON, verdict=verdict, evidence=evidence, target=likely)
    return Outcome(split=split, embedding=features, findings={"values": values, "dimensions": used})


def quantum_entropy(features: np.ndarray, rate: float, alpha: float) -> tuple[np.ndarray, float, int]:
    """Return the scores (n,) of a class's features (n, d), the value they are chosen by, and the number of principal dimensions it was found with.

    Dimensions are tried in squares, of which a class has at least ten images each: the covariance of fewer is noise. The one whose suspects (the 1.5 * rate highest) have the largest mean score wins.
    """
    centred = features - features.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    best: tuple[np.ndarray, float, int] | None = None
    for dimensions in (square for square in (1, 4, 9, 16, 25, 36, 49, 64) if square <= max(min(len(directions), len(features) // 10), 1)):
        points = centred @ directions[:dimensions].T
        mean, covariance = robust_moments(points, rate)
        white = (points - mean) @ inverse_root(covariance)
        scores = entropy_scores(white, alpha)
        value = float(np.sort(scores)[-max(int(1.5 * rate * len(scores)), 1) :].mean())
        if best is None or value > best[1]:
            best = scores, value, dimensions
    assert best is not None
    return best


def robust_moments(points: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Return mean (k,) and covariance (k, k) of points (n, k) of which a share `rate` may be poison: a filter removes at most twice as many.

    Each round takes away the points that are farthest out in the norm of the moments of what is left.
    """
    left = points
    most = int(2 * rate * len(points))
    rounds = 10
    for _ in range(rounds):
        mean, covariance = left.mean(0), np.cov(left.T).reshape(points.shape[1], points.shape[1])
        out = min(max(most // rounds, 0), len(left) - points.shape[1] - 2)
        if out <= 0:
            break
        distance = (((left - mean) @ inverse_root(covariance)) ** 2).sum(1)
        left = left[np.argsort(distance, kind="stable")[: len(left) - out]]
    return left.mean(0), np.cov(left.T).reshape(points.shape[1], points.shape[1])


def inverse_root(covariance: np.ndarray) -> np.ndarray:
    """Return the inverse square root of a covariance (k, k); directions without variance are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-10 * max(float(values[-1]), 1e-300)
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def entropy_scores(white: np.ndarray, alpha: float) -> np.ndarray:
    """Return `x^T M x` of whitened points (n, k), `M = expm(alpha (S - I) / (|S|_2 - 1)) / trace` with S their covariance (a matrix exponential)."""
    from scipy.linalg import expm

    size = white.shape[1]
    covariance = np.cov(white.T).reshape(size, size)
    excess = float(np.linalg.norm(covariance, 2)) - 1
    # One dimension, or nothing that spreads: all directions count alike.
    weights = expm(alpha * (covariance - np.eye(size)) / excess) if size > 1 and excess > 1e-6 else np.eye(size)
    return np.einsum("ni,ij,nj->n", white, weights / np.trace(weights), white)

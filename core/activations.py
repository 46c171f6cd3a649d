"""What a classifier trained on the suspect set makes of its images; the ground of the cleansers that look at activations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from core import victim
from core.catalog import Inputs
from core.classifier import Classifier, checked
from core.images import ImageSet, as_floats, at_once
from core.run import Run
from core.split import Cleansing, Split, Verdict, acquitted, of_flags, stands_out

# Two clusters of a class that is one are less apart than this (silhouette): 0.26 at most in nine sets of CIFAR-10, 0.5 and more where all classes have guests.
APART = 0.4
# A class may be two groups by nature. The digit 1 was, with chances down to 4e-5 in 28 trainings on clean sets; those of the seven attacks on CIFAR-10 with a target are below 6e-8.
NATURAL = 1e-5
# A method that flags less of the poison than this has missed some of it.
COVERED = 0.9


class Observing(Cleansing, victim.Training):
    """Parameters of every cleanser that needs a classifier trained on the set; a model given with the job is taken instead."""


def observer(run: Run, inputs: Inputs, params: Observing) -> Classifier:
    """Return the model that was given, or a classifier trained plainly on the suspect set."""
    assert inputs.suspect is not None
    if inputs.model is not None:
        return inputs.model.eval()
    run.phase("training")
    return victim.train(
        run, inputs.suspect, architecture=params.architecture, preprocessing=inputs.preprocessing, recipe=params.schedule(), name="observer"
    ).eval()


@torch.no_grad()
def collect(run: Run, function: Callable[[torch.Tensor], torch.Tensor], data: ImageSet, *, batch_size: int = 500) -> torch.Tensor:
    """Return `function` of float images in [0, 1] for all of `data`, in order, as one float32 tensor on the run's device.

    Args:
        batch_size: at most; fewer of large images.

    Raises `OutputsNotFinite`.
    """
    found = []
    for chunk in data.images.split(at_once(data.images[:1].numel(), batch_size)):
        run.check_cancelled()
        found.append(function(as_floats(chunk.to(run.device))).float())
    return checked(torch.cat(found))


# -- is a class one group or two? --------------------------------------------------------------------------------------


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


def inverse(covariance: np.ndarray) -> np.ndarray:
    """Return the inverse of a covariance (d, d), slightly rounded so that dead features do not count infinitely."""
    return np.linalg.inv(covariance + 1e-6 * max(float(np.trace(covariance)), 1e-12) / len(covariance) * np.eye(len(covariance)))


def elsewhere(features: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[np.ndarray, np.ndarray, Callable[[int], np.ndarray]]:
    """Return the features (N, d) and labels (N,) as arrays, and what gives for a class the metric (d, d) of how images vary within the other classes."""
    points, which = features.cpu().double().numpy(), labels.cpu().numpy()

    def own(label: int) -> np.ndarray:
        return np.cov(points[which == label].T).reshape(points.shape[1], points.shape[1])

    # Of a thousand classes the covariances would be larger than the set: each is computed twice instead.
    total = sum((own(label) for label in range(1, classes)), own(0))
    return points, which, lambda label: inverse((total - own(label)) / (classes - 1))


def two_groups(features: torch.Tensor, labels: torch.Tensor, classes: int) -> list[float]:
    """Return how well each class is explained as two groups instead of one, by how images vary within the other classes.

    SCAn's likelihood ratio without its clean images: the other classes stand in for them, which holds while few classes are contaminated.

    Args:
        features: (N, d). labels: (N,).
    """
    points, which, metric = elsewhere(features, labels, classes)
    return [untangle(points[which == label], metric(label))[1] for label in range(classes)]


def cut_in_two(features: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[Verdict, str, int | None]:
    """Return verdict, evidence and class of a set in which one class is two groups as no other is; nature has such classes, too, if not as clear."""
    return stands_out(two_groups(features, labels, classes), "what is gained by cutting a class in two", significance=NATURAL)


def flagged_by(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    scores: torch.Tensor,
    flagged: torch.Tensor,
    reason: str,
    *,
    verdict: Verdict,
    evidence: str,
    target: int | None,
) -> Split:
    """Return the split of a method that flags images (`of_flags`), with what it seems to have missed of the class that the poison leads to.

    Args:
        features: (N, d), the model's. labels, scores, flagged: (N,).
    """
    missed = overlooked(features, labels, classes, target, flagged) if verdict == "poisoned" and target is not None else ""
    return of_flags(labels, scores, flagged, reason, verdict=verdict, evidence=evidence, target=target, missed=missed)


def overlooked(features: torch.Tensor, labels: torch.Tensor, classes: int, target: int, flagged: torch.Tensor) -> str:
    """Return a sentence on how much of the poison stays in the set at least; empty where nearly all of one of the target class's two groups is flagged.

    Which of the groups is the poison is not known here, so it is taken for the one that was flagged more.

    Args:
        features: (N, d), the model's. labels: (N,). flagged: (N,) bool.
    """
    points, which, metric = elsewhere(features, labels, classes)
    own = points[which == target]
    groups = untangle(own, metric(target))[0](own) > 0
    dropped = flagged.cpu().numpy()[which == target]
    sizes, shares = zip(*((len(part), float(part.mean()) if len(part) else 0.0) for part in (dropped[groups], dropped[~groups])), strict=True)
    if max(shares) >= COVERED:
        return ""
    return (
        f"to the model class {target} is two groups of {sizes[0]} and {sizes[1]} images, of which {shares[0]:.0%} and {shares[1]:.0%} are flagged: "
        f"whichever is the poison, {1 - max(shares):.0%} of it or more is still in the set; try another method, or scan with more clean images"
    )


def clusters(features: np.ndarray, dimensions: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Cut the features (n, d) of a class in two: return the mask (n,) of the smaller cluster, how much nearer each lies to it, and the mean silhouette."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score

    reduced = PCA(min(dimensions, *features.shape), random_state=seed).fit_transform(features)
    found = KMeans(2, n_init=10, random_state=seed).fit(reduced)
    smaller = int(np.bincount(found.labels_, minlength=2).argmin())
    distances = found.transform(reduced)
    silhouette = silhouette_score(reduced, found.labels_, sample_size=min(len(reduced), 2000), random_state=seed) if len(set(found.labels_)) == 2 else 0.0
    return found.labels_ == smaller, distances[:, 1 - smaller] - distances[:, smaller], float(silhouette)


@torch.no_grad()
def observed(model: Classifier, features: torch.Tensor, labels: torch.Tensor, classes: int, seed: int) -> tuple[Verdict, str, int | None]:
    """Return verdict, evidence and class of a set from what a classifier trained on it makes of it: poison makes its target class two groups.

    Where poison leads to every class, none stands out, and none can stand for the others; then clear clusters keep the set from being acquitted.
    So does a classifier that does not know the set.

    Args:
        features: (N, d), the model's. labels: (N,).
    """
    verdict, evidence, target = cut_in_two(features, labels, classes)
    if verdict == "no_evidence":
        points = features.cpu().double().numpy()
        apart = max(clusters(points[(labels == label).cpu().numpy()], 10, seed)[2] for label in range(classes))
        if apart > APART:
            return "inconclusive", f"no class stands out, but there are classes of two clear clusters (silhouette {apart:.2g}); {evidence}", None
    return *acquitted(verdict, evidence, model.head(features).argmax(1) == labels, "model"), target

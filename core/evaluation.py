"""BA, ASR, PA and DER with counts and intervals; every rate is a count over a count."""

from __future__ import annotations

import math
from typing import Any

import torch

from core.classifier import Classifier, checked
from core.images import ImageSet, as_floats
from core.poisoning import Triggered
from core.training import mixed_precision

# What `evaluate` may measure beside `per_class`, in the order it is shown.
RATES = ("ba", "ba_excluding_target", "asr", "asr_without_trigger", "pa")


def rate(hits: int, count: int) -> dict[str, Any]:
    """Return `{value, hits, n, low, high}`: a share in [0, 1] with its 95 % Wilson interval; value is None for n = 0."""
    if count == 0:
        return {"value": None, "hits": 0, "n": 0, "low": None, "high": None}
    z = 1.959963984540054
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return {"value": share, "hits": hits, "n": count, "low": max(centre - half, 0.0), "high": min(centre + half, 1.0)}


@torch.no_grad()
def predict(classifier: Classifier, images: torch.Tensor, *, batch_size: int | None = None, mixed: bool = False) -> torch.Tensor:
    """Return the predicted classes (N,) of uint8 images (N, C, H, W), in eval mode and (by default) full precision.

    Raises `OutputsNotFinite`.
    """
    was_training = classifier.training
    classifier.eval()
    device = next(classifier.parameters()).device
    # Activations of a hundred images still fit into a processor's caches.
    batch_size = batch_size or (500 if device.type == "cuda" else 100)
    found = []
    for chunk in images.split(batch_size):
        with mixed_precision(device, enabled=mixed):
            found.append(classifier(as_floats(chunk.to(device))))
    classifier.train(was_training)
    return checked(torch.cat(found)).argmax(1) if found else torch.empty(0, dtype=torch.int64)


def evaluate(classifier: Classifier, test: ImageSet, triggered: Triggered | None = None, *, mixed: bool = False) -> dict[str, Any]:
    """Measure a classifier on labelled clean images and, if there are any, on triggered ones.

    Returns rates (see `rate`): `ba` over all images, `per_class`; with triggered images `ba_excluding_target` (all-to-one),
    `asr` (predicted as the attacker wants), `pa` (predicted as their true class) and, all-to-one, `asr_without_trigger`: how often the
    same images are taken for the target without the trigger, which no purification can be expected to undercut. `asr` here is always *measured*.
    """
    assert test.labels is not None
    labels = test.labels.cpu()
    predicted = predict(classifier, test.images, mixed=mixed).cpu()
    right = predicted == labels
    result: dict[str, Any] = {
        "ba": rate(int(right.sum()), len(right)),
        "per_class": [rate(int(right[labels == c].sum()), int((labels == c).sum())) for c in range(classifier.classes)],
    }
    if triggered is not None:
        if triggered.target is not None:
            others = labels != triggered.target
            result["ba_excluding_target"] = rate(int(right[others].sum()), int(others.sum()))
            result["asr_without_trigger"] = rate(int((predicted[others] == triggered.target).sum()), int(others.sum()))
        found = predict(classifier, triggered.images, mixed=mixed).cpu()
        result["asr"] = rate(int((found == triggered.wanted.cpu()).sum()), len(found))
        result["pa"] = rate(int((found == triggered.labels.cpu()).sum()), len(found))
    return result


def defense_effectiveness(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Return DER = (max(0, dASR) - max(0, dBA) + 1) / 2 in [0, 1], or None when ASR was not measured."""
    if "asr" not in before or "asr" not in after:
        return None
    gained = max(0.0, before["asr"]["value"] - after["asr"]["value"])
    lost = max(0.0, before["ba"]["value"] - after["ba"]["value"])
    return (gained - lost + 1) / 2


def split_precision(is_poisoned: torch.Tensor, clean: torch.Tensor, suspect: torch.Tensor) -> dict[str, Any]:
    """Return precision and recall of a split of the training set.

    Args:
        is_poisoned: (N,) bool, the hidden truth: the image carries a trigger, whatever its label.
        clean, suspect: (N,) bool, what a method takes for clean and for poisoned; what is in neither is undecided.
    """
    poisoned = is_poisoned.bool().cpu()
    clean, suspect = clean.bool().cpu(), suspect.bool().cpu()

    def share(part: torch.Tensor, of: torch.Tensor) -> dict[str, Any]:
        return rate(int((part & of).sum()), int(of.sum()))

    return {
        "clean_precision": share(~poisoned, clean),
        "clean_recall": share(clean, ~poisoned),
        "poison_precision": share(poisoned, suspect),
        "poison_recall": share(suspect, poisoned),
    }


def filter_rates(is_poisoned: torch.Tensor, accepted: torch.Tensor) -> dict[str, Any]:
    """Return the shares of clean and of poisoned images, (N,) bool, that a filter accepts (SSL-Cleanse, Tables 1 and 3)."""
    poisoned, accepted = is_poisoned.bool().cpu(), accepted.bool().cpu()
    return {
        "clean_accepted": rate(int((accepted & ~poisoned).sum()), int((~poisoned).sum())),
        "poisoned_accepted": rate(int((accepted & poisoned).sum()), int(poisoned.sum())),
    }

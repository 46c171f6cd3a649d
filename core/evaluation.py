"""BA, ASR, PA and DER with counts and intervals; every rate is a count over a count."""

from __future__ import annotations

import math
from typing import Any

import torch

from core import catalog
from core.catalog import Params
from core.classifier import Classifier
from core.images import ImageSet, as_floats
from core.training import mixed_precision


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
def predict(classifier: Classifier, images: torch.Tensor, *, batch_size: int = 500, mixed: bool = False) -> torch.Tensor:
    """Return the predicted classes (N,) of uint8 images (N, C, H, W), in eval mode and (by default) full precision."""
    was_training = classifier.training
    classifier.eval()
    device = next(classifier.parameters()).device
    found = []
    for chunk in images.split(batch_size):
        with mixed_precision(device, enabled=mixed):
            found.append(classifier(as_floats(chunk.to(device))).argmax(1))
    classifier.train(was_training)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def triggered(test: ImageSet, attack: Params) -> torch.Tensor:
    """Return the test images that count for ASR (true class is not the target), with the trigger: uint8."""
    assert test.labels is not None
    method = catalog.attacks()[attack.method]  # type: ignore[attr-defined]
    stamped: torch.Tensor = method.run(test.images[test.labels != attack.target], attack)  # type: ignore[attr-defined]
    return stamped


def evaluate(classifier: Classifier, test: ImageSet, attack: Params | None = None, *, mixed: bool = False) -> dict[str, Any]:
    """Measure a classifier on labelled clean images and, if the attack is declared, on triggered ones.

    Returns rates (see `rate`): `ba` over all images, `per_class`; with an attack `ba_excluding_target`, and
    `asr` and `pa` over the images whose class is not the target. `asr` here is always *measured*.
    """
    assert test.labels is not None
    labels = test.labels.cpu()
    right = predict(classifier, test.images, mixed=mixed).cpu() == labels
    result: dict[str, Any] = {
        "ba": rate(int(right.sum()), len(right)),
        "per_class": [rate(int(right[labels == c].sum()), int((labels == c).sum())) for c in range(classifier.classes)],
    }
    if attack is not None:
        others = labels != attack.target  # type: ignore[attr-defined]
        found = predict(classifier, triggered(test, attack), mixed=mixed).cpu()
        result["ba_excluding_target"] = rate(int(right[others].sum()), int(others.sum()))
        result["asr"] = rate(int((found == attack.target).sum()), len(found))  # type: ignore[attr-defined]
        result["pa"] = rate(int((found == labels[others]).sum()), len(found))
    return result


def defense_effectiveness(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Return DER = (max(0, dASR) - max(0, dBA) + 1) / 2 in [0, 1], or None when ASR was not measured."""
    if "asr" not in before or "asr" not in after:
        return None
    gained = max(0.0, before["asr"]["value"] - after["asr"]["value"])
    lost = max(0.0, before["ba"]["value"] - after["ba"]["value"])
    return (gained - lost + 1) / 2

"""Whether one class stands out among all: what every inspection and the verdicts on training sets ask in the end."""

from __future__ import annotations

import math

import numpy as np


def p_value(found: list[float], least: float = 0.0) -> float:
    """Return how likely a largest value like this is when all classes are alike, in [0, 1] (Grubbs' test, one-sided).

    The largest value is compared with mean and deviation of the others; times the number of classes, because any of them may be the largest.
    MM-BD fits a gamma distribution to the others instead, as if they were no selection: with ten classes that raises the alarm at 0.05 for
    a quarter of all samples without an outlier.

    Args:
        least: deviation that the others are taken to have at least.
    """
    from scipy.stats import t

    values = np.sort(np.asarray(found, dtype=np.float64))
    rest, count = values[:-1], len(values)
    spread = max(float(rest.std(ddof=1)) if count > 2 else 0.0, least)
    if spread == 0:
        return 0.0 if values[-1] > rest.max() else 1.0
    distance = (values[-1] - rest.mean()) / (spread * np.sqrt(1 + 1 / (count - 1)))
    return float(min(count * t.sf(distance, count - 2), 1.0))


def judge(chance: float, what: str, classes: int, significance: float) -> tuple[str, str]:
    """Return the verdict and the sentence that explains it.

    Args:
        chance: `p_value` of the classes' values. what: the value that stands out most, and its class.
        significance: below which chance the model is called backdoored.
    """
    if classes < 4:
        return "not_fully_examined", f"{classes} classes are too few for an outlier test"
    # A network whose activations overflow has no values to compare.
    if math.isnan(chance):
        return "not_fully_examined", f"{what} cannot be compared: the model's outputs are not finite"
    if chance < significance:
        return "backdoored", f"{what} is an outlier (p = {chance:.2g})"
    if chance < 5 * significance:
        return "inconclusive", f"{what} is unusual (p = {chance:.2g})"
    return "no_evidence", f"no outlier: {what} stands out most, with p = {chance:.2g}"

"""Margins, their p-value, and what several inspections mean together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t

from core import catalog
from core.catalog import Inputs
from core.defenses.inspect.combined import combine
from core.margins import largest_margins, margins
from core.outliers import judge, p_value
from core.run import Run
from tests.core.untrained import model, noise


def test_margins_equal_the_slow_form() -> None:
    logits, labels = torch.randn(7, 5), torch.arange(7) % 5
    for row, label, found in zip(logits, labels, margins(logits, labels), strict=True):
        assert float(found) == pytest.approx(float(row[label]) - max(float(row[k]) for k in range(5) if k != int(label)))


def test_climbing_lifts_every_class_and_repeats() -> None:
    classifier = model(classes=4)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    low, high, again = (largest_margins(Run(seed=1, device="cpu"), "climb", classifier, (3, 16, 16), starts=3, steps=steps) for steps in (1, 20, 20))
    assert all(a > b for a, b in zip(high, low, strict=True)) and high == again
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_an_outlier_is_improbable_and_a_sample_is_not() -> None:
    draws = np.random.default_rng(0)
    for sample in (lambda: draws.normal(60, 10, 10), lambda: draws.gamma(25, 3, 10)):
        chances = np.array([p_value(list(sample())) for _ in range(2000)])
        assert (chances < 0.01).mean() < 0.035 and (chances < 0.05).mean() < 0.12
    # Studentised by hand.
    rest = np.array([1.0, 2.0, 3.0, 4.0])
    distance = (9 - rest.mean()) / (rest.std(ddof=1) * np.sqrt(1 + 1 / 4))
    assert p_value([1.0, 9.0, 2.0, 3.0, 4.0]) == pytest.approx(5 * t.sf(distance, 3))
    assert p_value([60.0, 55, 70, 65, 58, 300, 62, 59, 66, 61]) < 1e-6
    assert p_value([5.0] * 10) == 1.0 and p_value([5.0] * 9 + [9.0]) == 0.0
    assert p_value([5.0] * 9 + [9.0], least=2.0) == pytest.approx(10 * t.sf(4 / (2 * np.sqrt(1 + 1 / 9)), 8))
    assert p_value([-3.0, -1, 2, 4, 5, 6, 3, 2, 4, 5]) == 1.0


def said(verdict: str, target: int | None = None) -> dict[str, Any]:
    return {"verdict": verdict, "reason": verdict, "target": target}


def test_one_alarm_is_enough_and_doubt_is_never_called_clean() -> None:
    for a, b, verdict, target in (
        (said("backdoored", 3), said("no_evidence"), "backdoored", 3),
        (said("not_fully_examined"), said("backdoored", 4), "backdoored", 4),
        (said("not_fully_examined"), said("no_evidence"), "not_fully_examined", None),
        (said("inconclusive"), said("no_evidence"), "inconclusive", None),
        (said("no_evidence"), said("no_evidence"), "no_evidence", None),
    ):
        for pair in ({"x": a, "y": b}, {"y": b, "x": a}):
            found = combine(pair)
            assert (found["verdict"], found["target"]) == (verdict, target) and found["methods"] == pair
    assert combine({"x": said("backdoored", 1), "y": said("backdoored", 2), "z": said("backdoored", 2)})["target"] == 2


def test_the_verdict_of_an_outlier() -> None:
    assert judge(0.001, "it", 10, 0.05)[0] == "backdoored"
    assert judge(0.1, "it", 10, 0.05)[0] == "inconclusive"
    assert judge(0.6, "it", 10, 0.05)[0] == "no_evidence"
    assert judge(0.0, "it", 2, 0.05)[0] == "not_fully_examined"


@pytest.mark.parametrize("method", ["mm_bd", "pt_red"])
def test_a_model_that_overflows_is_not_called_clean(method: str) -> None:
    broken = model(classes=5)
    with torch.no_grad():
        broken.head.weight.fill_(3e38)
    inspector = catalog.defenses()[method]
    inputs = Inputs(model=broken, clean=noise())
    found = inspector.run(Run(device="cpu"), inputs, inspector.params(method=method, steps=3)).findings
    assert found["verdict"] == "not_fully_examined" and found["target"] is None

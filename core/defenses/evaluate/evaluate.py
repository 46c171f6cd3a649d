"""Evaluate: measure a model, change nothing."""

from __future__ import annotations

from typing import Literal

from core.catalog import Inputs, Need, Outcome, Params, defense
from core.run import Run


class Evaluate(Params):
    """Nothing to choose."""

    method: Literal["evaluate"]


@defense(title="Evaluation", paper="BA, ASR and PA as in docs/methods; intervals after Wilson, JASA 1927", needs=(Need.MODEL, Need.TEST_SET))
def run(run: Run, inputs: Inputs, params: Evaluate) -> Outcome:
    """Measure a model on a labelled test set and, if the attack or triggered images are given, its ASR and PA.

    The numbers are the report's `before`: what every job measures first.
    """
    return Outcome()

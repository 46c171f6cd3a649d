"""MCLDef+: MCLDef, then a third stage that pulls positive pairs alone; for 10 % of clean images and more."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.catalog import Inputs, Need, Outcome, defense
from core.contrast import Contrast, calibrate, correct, eliminate
from core.recovery import Recovery, recover
from core.run import Run


class MCLDefPlus(Recovery, Contrast):
    """Parameters; the paper gives neither epochs nor rate of the third stage."""

    method: Literal["mcldef_plus"]
    correction_epochs: int = Field(default=10, ge=1, le=1000, title="Correction epochs")
    correction_rate: float = Field(default=0.01, gt=0, le=10, title="Correction rate", description="Of the first half of the correction, then a tenth.")


@defense(
    title="MCLDef+",
    paper="Model-contrastive learning for backdoor elimination (MCLDef), Eqs. 1 to 6",
    needs=(Need.MODEL, Need.CLEAN_IMAGES),
)
def run(run: Run, inputs: Inputs, params: MCLDefPlus) -> Outcome:
    """Purify with MCLDef, then correct the features of triggered images once more; no labels."""
    assert inputs.model is not None
    teacher = inputs.model.frozen_copy()
    found = recover(run, inputs, params)
    run.phase("contrasting")
    student, history = eliminate(run, inputs, teacher, found.stamp, params)
    run.phase("correcting")
    corrected = correct(run, inputs, teacher, student, found.stamp, params, epochs=params.correction_epochs, rate=params.correction_rate)
    findings = {"target": found.target, **found.findings, "loss": history, "correction_loss": corrected}
    if params.calibrate:
        findings["calibration"] = calibrate(run, inputs, teacher, student)
    return Outcome(model=student, findings=findings, triggers=found.triggers)

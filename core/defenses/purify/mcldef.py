"""MCLDef: recover the trigger, then pull triggered features to the teacher's clean ones, with a few clean images."""

from __future__ import annotations

from typing import Literal

from core.catalog import Inputs, Need, Outcome, defense
from core.contrast import Contrast, calibrate, eliminate
from core.recovery import Recovery, recover
from core.run import Run


class MCLDef(Recovery, Contrast):
    """Parameters. `anchor` 0, `learning_rate` 0.1, `inversion_epochs` 100 and `calibrate` false are the published method on CIFAR-10."""

    method: Literal["mcldef"]


@defense(
    title="MCLDef",
    paper="Model-contrastive learning for backdoor elimination (MCLDef), Eqs. 1 to 4",
    needs=(Need.MODEL, Need.CLEAN_IMAGES),
)
def run(run: Run, inputs: Inputs, params: MCLDef) -> Outcome:
    """Purify a model with a recovered trigger and model-contrastive learning; no labels, no cross-entropy."""
    assert inputs.model is not None
    found = recover(run, inputs, params)
    run.phase("contrasting")
    teacher = inputs.model.frozen_copy()
    student, history = eliminate(run, inputs, teacher, found.stamp, params)
    findings = {"target": found.target, **found.findings, "loss": history}
    if params.calibrate:
        findings["calibration"] = calibrate(run, inputs, teacher, student)
    return Outcome(model=student, findings=findings, triggers=found.triggers)

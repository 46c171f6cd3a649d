"""MCLDef: recover the trigger, then pull triggered features to the teacher's clean ones, with a few clean images."""

from __future__ import annotations

from typing import Literal

from core.catalog import Inputs, Need, Outcome, defense
from core.contrast import Contrast, calibrate, eliminate
from core.recovery import Recovery, recover
from core.run import Run


class MCLDef(Recovery, Contrast):
    """Parameters. On 2,500 images of CIFAR-10 the published method has `anchor` 0, `learning_rate` 0.1, `calibrate` false, `patience` 1200, `tolerance` 0."""

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

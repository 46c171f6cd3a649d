"""MCLDef: recover the trigger, then pull triggered features to the teacher's clean ones, with a few clean images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from core.catalog import Inputs, Need, Outcome, defense
from core.contrast import Contrast, calibrate, eliminate
from core.errors import TriggerNotFound
from core.recovery import Recovered, Recovery, Stamp, recover
from core.run import Run


class MCLDef(Recovery, Contrast):
    """Parameters. On 2,500 images of CIFAR-10 the published method has `anchor` 0, `calibrate` false, `patience` 1200, `tolerance` 0, `rounds` 1."""

    method: Literal["mcldef"]
    rounds: int = Field(
        default=2,
        ge=1,
        le=10,
        title="Rounds",
        description="At most; 1 as published. A trigger that is spread over the image is recovered in part; before each further round another one is recovered from the "
        "purified model, and while its mask is less than `growth` times the first one's, the suspect model is purified against all that were found.",
    )
    growth: float = Field(
        default=2.5,
        gt=0,
        le=1000,
        title="Growth",
        description="A mask this many times as large as the first one is taken for no part of the backdoor: any model has one. More removes more of a trigger that is found "
        "piece by piece, and may cost accuracy, above all the target class's, where nothing is left.",
    )


@defense(
    title="MCLDef",
    paper="Model-contrastive learning for backdoor elimination (MCLDef), Eqs. 1 to 4",
    needs=(Need.MODEL, Need.CLEAN_IMAGES),
    caution="On small models with 300 clean images it left 8 to 22 % of smooth warps, which no mask expresses, and 27 % of one Trojan pattern of three.",
)
def run(run: Run, inputs: Inputs, params: MCLDef) -> Outcome:
    """Purify a model with a recovered trigger and model-contrastive learning; no labels, no cross-entropy."""
    found = [recover(run, inputs, params)]
    outcome = purified(run, inputs, params, found)
    left: list[dict[str, Any]] = []
    for number in range(2, params.rounds + 1):
        with run.scope(f"round {number}"):
            try:
                found.append(recover(run, replace(inputs, model=outcome.model), params.model_copy(update={"target": found[0].target})))
            except TriggerNotFound as nothing:
                run.log(nothing.message)
                break
            left.append(found[-1].findings["trigger"])
            if left[-1]["mask_norm"] >= params.growth * found[0].findings["trigger"]["mask_norm"]:
                break
            outcome = purified(run, inputs, params, found)
    if params.rounds > 1:
        outcome.findings["left"] = left
    return outcome


def purified(run: Run, inputs: Inputs, params: MCLDef, found: list[Recovered]) -> Outcome:
    """Return the suspect model purified against the recovered triggers."""
    assert inputs.model is not None
    run.phase("contrasting")
    teacher = inputs.model.frozen_copy()
    student, history = eliminate(run, inputs, teacher, any_of([one.stamp for one in found]), params)
    findings = {"target": found[0].target, **found[0].findings, "loss": history}
    if params.calibrate:
        findings["calibration"] = calibrate(run, inputs, teacher, student)
    return Outcome(model=student, findings=findings, triggers=found[0].triggers)


def any_of(stamps: list[Stamp]) -> Stamp:
    """Return what puts one of the triggers on a batch, drawn anew for each."""
    if len(stamps) == 1:
        return stamps[0]
    return lambda images, generator: stamps[int(torch.randint(len(stamps), (1,), generator=generator))](images, generator)

"""MCLDef (True): MCLDef with the attacker's own trigger, an upper bound for what recovering it can reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from core import catalog, poisoning
from core.catalog import Inputs, Need, Outcome, defense
from core.contrast import Contrast, calibrate, eliminate
from core.images import as_floats
from core.poisoning import AttackParams
from core.run import Run
from core.tuning import rate_field

if TYPE_CHECKING:
    Declared = AttackParams
else:
    Declared = catalog.union(catalog.attacks())


class MCLDefTrue(Contrast):
    """Parameters."""

    method: Literal["mcldef_true"]
    learning_rate: float = rate_field(0.2, "Of the first epoch; a tenth until half of the epochs, then a hundredth. As published: 0.1.")
    attack: Declared = Field(
        title="Attack", description='The attack whose trigger is used, as in an evaluation: `{"method": "badnets", "target": 5}`. It must need no training.'
    )


@defense(
    title="MCLDef (True)",
    paper="Model-contrastive learning for backdoor elimination (MCLDef), Eqs. 3 and 4 with the true trigger",
    needs=(Need.MODEL, Need.CLEAN_IMAGES),
)
def run(run: Run, inputs: Inputs, params: MCLDefTrue) -> Outcome:
    """Purify with model-contrastive learning against a declared attack's own trigger; no labels."""
    assert inputs.model is not None and inputs.clean is not None
    declared = params.attack
    _, channels, height, width = inputs.clean.images.shape
    trigger = poisoning.declared(declared, (channels, height, width), inputs.model.classes)

    def stamp(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        # An attack changes pixels as they are stored.
        return as_floats(trigger.stamp(images.mul(255).round().to(torch.uint8)))

    run.phase("contrasting")
    teacher = inputs.model.frozen_copy()
    student, history = eliminate(run, inputs, teacher, stamp, params)
    findings = {"target": declared.target if declared.labels != "all_to_all" else None, "loss": history}
    if params.calibrate:
        findings["calibration"] = calibrate(run, inputs, teacher, student)
    return Outcome(model=student, findings=findings)

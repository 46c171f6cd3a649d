"""MM-BD: a backdoor's class can be lifted above the others much further than any clean one; needs no data, and sees any kind of trigger."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.catalog import Inputs, Need, Outcome, Params, defense
from core.margins import largest_margins
from core.outliers import judge, p_value
from core.run import Run


class MMBD(Params):
    """Parameters."""

    method: Literal["mm_bd"]
    starts: int = Field(default=10, ge=1, le=1000, title="Starts", description="Random images a class that are climbed from.")
    steps: int = Field(default=150, ge=1, le=100_000, title="Steps")
    step: float = Field(default=0.1, gt=0, le=1, title="Step size", description="Of the first step, in [0, 1].")
    significance: float = Field(default=0.01, gt=0, lt=1, title="Significance", description="The model is called backdoored below this p-value.")


@defense(
    title="Maximum margin detection",
    paper="Wang et al., MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types, IEEE S&P 2024",
    needs=(Need.MODEL,),
)
def run(run: Run, inputs: Inputs, params: MMBD) -> Outcome:
    """Say whether one class's margin can be raised anomalously far, over all images, without any data."""
    assert inputs.model is not None
    model = inputs.model
    side = model.architecture.input_size
    height, width = (side, side) if inputs.clean is None else inputs.clean.images.shape[2:]
    run.phase("climbing")
    found = largest_margins(run, "climb", model, (model.architecture.channels, height, width), starts=params.starts, steps=params.steps, rate=params.step)
    chance = p_value(found)
    highest = max(range(model.classes), key=lambda label: found[label])
    verdict, reason = judge(chance, f"class {highest}'s margin", model.classes, params.significance)
    run.log(f"{verdict}: {reason}", margins=found)
    target = highest if verdict == "backdoored" else None
    return Outcome(findings={"verdict": verdict, "reason": reason, "target": target, "margins": found, "p_value": chance})

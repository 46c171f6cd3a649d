"""PT-RED: a backdoor's class can be reached with a much smaller change of the whole image than any clean one; sees waves, warps and grids."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from core.catalog import Inputs, Need, Outcome, Params, defense
from core.errors import NotEnoughCleanData
from core.outliers import judge, p_value
from core.perturbation import Perturbations, smallest_perturbations
from core.run import Run


class PTRED(Params):
    """Parameters; all classes are examined together, on batches that they share."""

    method: Literal["pt_red"]
    success: float = Field(
        default=0.95, gt=0, le=1, title="Success rate", description="Share of the other classes' images that a perturbation must send to its class."
    )
    step: float = Field(default=0.003, gt=0, le=1, title="Step size", description="Root mean square a pixel, of values in [0, 1].")
    steps: int = Field(default=400, ge=1, le=100_000, title="Steps", description="At most; classes that are reached leave earlier.")
    batch_size: int = Field(default=32, ge=1, le=4096, title="Batch size")
    significance: float = Field(default=0.01, gt=0, lt=1, title="Significance", description="The model is called backdoored below this p-value.")


@defense(
    title="Perturbation inversion (PT-RED)",
    paper="Xiang et al., Detection of Backdoors in Trained Classifiers Without Access to the Training Set, IEEE TNNLS 2020",
    needs=(Need.MODEL, Need.CLEAN_IMAGES),
    caution="A small patch of strong contrast takes as long a perturbation as any clean class: of a 3x3 patch on CIFAR-10 it saw nothing. Neural Cleanse is for those.",
)
def run(run: Run, inputs: Inputs, params: PTRED) -> Outcome:
    """Say whether one class can be reached with an anomalously small perturbation of the whole image, and show it."""
    findings, found = examine(run, inputs, params)
    return Outcome(findings=findings, perturbations={findings["smallest"]: found.images[findings["smallest"]]})


def examine(run: Run, inputs: Inputs, params: PTRED) -> tuple[dict[str, Any], Perturbations]:
    """Perturb towards every class; return the findings and all perturbations.

    The paper asks for every pair of classes, and fits a null distribution to the reciprocals of the norms; here the images of all other classes
    have one perturbation, and the reciprocals are tested as MM-BD's margins are.

    Raises:
        NotEnoughCleanData: when the clean images do not fill a batch.
    """
    assert inputs.model is not None and inputs.clean is not None
    model = inputs.model
    if len(inputs.clean) < params.batch_size:
        raise NotEnoughCleanData(f"{len(inputs.clean)} clean images, a batch takes {params.batch_size}", "Give more clean images or a smaller batch_size.")
    run.phase("perturbing")
    found = smallest_perturbations(
        run, "perturb", model, inputs.clean, success=params.success, step=params.step, steps=params.steps, batch_size=params.batch_size
    )
    norms = found.norms
    chance = p_value([1 / max(norm, 1e-9) for norm in norms])
    smallest = min(range(model.classes), key=lambda label: norms[label])
    verdict, reason = judge(chance, f"the perturbation of length {norms[smallest]:.2f} that leads to class {smallest}", model.classes, params.significance)
    # A class that was not reached takes more than what is counted for it.
    missed = [label for label, share in enumerate(found.success) if share < params.success]
    if missed and (verdict != "backdoored" or smallest in missed):
        verdict, reason = "not_fully_examined", f"no perturbation was found for classes {missed}; raise `steps`"
    run.log(f"{verdict}: {reason}")
    target = smallest if verdict == "backdoored" else None
    findings = {
        "verdict": verdict,
        "reason": reason,
        "target": target,
        "smallest": smallest,
        "norms": norms,
        "p_value": chance,
        "success": found.success,
    }
    return findings, found

"""Combined inspection: Neural Cleanse for patches, PT-RED for what covers the image, maximum margins for any trigger, and one verdict."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from core.catalog import Inputs, Need, Outcome, Params, defense
from core.defenses.inspect import mm_bd, neural_cleanse, pt_red
from core.run import Run


class Combined(Params):
    """Parameters; the thresholds are stricter than each method's own, because any of them may raise the alarm."""

    method: Literal["combined"]
    passes: int = Field(default=120, ge=1, le=10_000, title="Passes of Neural Cleanse", description="At most this many.")
    threshold: float = Field(default=3.0, gt=0, le=100, title="Anomaly index", description="Of Neural Cleanse.")
    starts: int = Field(default=10, ge=1, le=1000, title="Starts of MM-BD", description="Random images a class.")
    steps: int = Field(default=150, ge=1, le=100_000, title="Steps of MM-BD")
    perturbation_steps: int = Field(default=400, ge=1, le=100_000, title="Steps of PT-RED", description="At most this many.")
    significance: float = Field(default=0.005, gt=0, lt=1, title="Significance", description="Of MM-BD and PT-RED.")


@defense(
    title="Combined inspection",
    paper="Wang et al., Neural Cleanse, IEEE S&P 2019; Xiang et al., PT-RED, IEEE TNNLS 2020; Wang et al., MM-BD, IEEE S&P 2024",
    needs=(Need.MODEL, Need.CLEAN_IMAGES),
    caution="Of 20 backdoored small models it found 18, and neither of two blends of strength 0.3; of 20 clean ones it called one backdoored.",
)
def run(run: Run, inputs: Inputs, params: Combined) -> Outcome:
    """Inspect a model with three methods that see different triggers, and say what they mean together."""
    assert inputs.model is not None and inputs.clean is not None
    batch = min(32, len(inputs.clean))
    patches = neural_cleanse.NeuralCleanse(method="neural_cleanse", passes=params.passes, threshold=params.threshold, batch_size=batch)
    found, triggers = neural_cleanse.examine(run, inputs, patches)
    margins = mm_bd.MMBD(method="mm_bd", starts=params.starts, steps=params.steps, significance=params.significance)
    lifted = mm_bd.run(run, inputs, margins).findings
    whole = pt_red.PTRED(method="pt_red", steps=params.perturbation_steps, batch_size=batch, significance=params.significance)
    perturbed, perturbations = pt_red.examine(run, inputs, whole)
    combined = combine({"neural_cleanse": found, "pt_red": perturbed, "mm_bd": lifted})
    run.log(f"{combined['verdict']}: {combined['reason']}")
    suspects = [target for target in (combined["target"], found["target"], lifted["target"]) if target is not None]
    shown = {perturbed["target"]: perturbations.images[perturbed["target"]]} if perturbed["target"] is not None else {}
    return Outcome(findings=combined, triggers={label: triggers.of(label) for label in dict.fromkeys(suspects)}, perturbations=shown)


def combine(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the verdict of several inspections, by method name.

    One that says `backdoored` is enough, and the one that names the same target as another speaks first. Without one, whatever could not be
    examined or decided stands: `no_evidence` means that every method looked and found nothing.
    """
    for verdict in ("backdoored", "not_fully_examined", "inconclusive", "no_evidence"):
        said = {name: one for name, one in found.items() if one["verdict"] == verdict}
        if said:
            break
    targets = [one["target"] for one in said.values() if one["target"] is not None]
    target = max(targets, key=targets.count) if targets else None
    reason = "; ".join(f"{name}: {one['reason']}" for name, one in said.items())
    return {"verdict": verdict, "reason": reason, "target": target, "methods": found}

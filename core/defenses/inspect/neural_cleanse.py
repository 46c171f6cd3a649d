"""Neural Cleanse: invert a trigger for every label; a backdoor's is anomalously small (Wang et al., S&P 2019)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from core import inversion
from core.catalog import Inputs, Need, Outcome, Params, defense
from core.errors import NotEnoughCleanData
from core.run import Run


class NeuralCleanse(Params):
    """Parameters; all labels are inverted together, on batches that they share."""

    method: Literal["neural_cleanse"]
    objective: Literal["dynamic", "fixed"] = Field(
        default="dynamic",
        title="Objective",
        description="`dynamic`: the cost follows the success rate, as in the original; `fixed`: MCLDef's Eq. 2.",
    )
    passes: int = Field(default=120, ge=1, le=10_000, title="Passes", description="At most this many; labels that have converged leave earlier.")
    batches_per_pass: int = Field(default=8, ge=1, le=10_000, title="Batches a pass")
    batch_size: int = Field(default=32, ge=1, le=4096, title="Batch size")
    success: float = Field(default=0.99, gt=0, le=1, title="Success rate", description="Share of images a trigger must send to its label (dynamic).")
    tolerance: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        title="Tolerance",
        description="Share by which a mask must shrink to count as smaller; a label whose mask has not in `patience` passes leaves (dynamic). 0 as published: any smaller "
        "mask counts, and the cost must have moved both ways. 0.05 with a patience of 20 takes two thirds of the time, and judged two of 40 small models worse.",
    )
    patience: int = Field(default=25, ge=1, le=10_000, title="Patience", description="Passes without a smaller mask.")
    mask_weight: float = Field(default=0.01, gt=0, le=10, title="Mask weight", description="lambda of the fixed objective.")
    threshold: float = Field(default=2.0, gt=0, le=100, title="Anomaly index", description="A label with a smaller mask and an index above this is flagged.")


@defense(
    title="Neural Cleanse",
    paper="Wang et al., Neural Cleanse, IEEE S&P 2019",
    needs=(Need.MODEL, Need.CLEAN_IMAGES),
)
def run(run: Run, inputs: Inputs, params: NeuralCleanse) -> Outcome:
    """Say whether one label can be reached with an anomalously small trigger, and show that trigger."""
    findings, triggers = examine(run, inputs, params)
    norms = findings["mask_norms"]
    shown = findings["suspects"] or [min(range(len(norms)), key=lambda label: norms[label])]
    return Outcome(findings=findings, triggers={label: triggers.of(label) for label in shown[:3]})


def examine(run: Run, inputs: Inputs, params: NeuralCleanse) -> tuple[dict[str, Any], inversion.Triggers]:
    """Invert every label; return the findings and all triggers."""
    assert inputs.model is not None and inputs.clean is not None
    model, clean = inputs.model, inputs.clean
    if len(clean) < params.batch_size:
        raise NotEnoughCleanData(f"{len(clean)} clean images, a batch takes {params.batch_size}", "Give more clean images or a smaller batch_size.")
    run.phase("inverting")
    _, channels, height, width = clean.images.shape
    shared: dict[str, Any] = {
        "classifier": model,
        "clean": clean,
        "passes": params.passes,
        "batches_per_pass": params.batches_per_pass,
        "batch_size": params.batch_size,
    }
    name = "invert all labels"
    if params.objective == "dynamic":
        triggers = inversion.invert_every_label(run, name, success=params.success, tolerance=params.tolerance, patience=params.patience, **shared)
    else:
        scale, offset = torch.ones(channels, device=run.device), torch.zeros(channels, device=run.device)
        start = run.generator(name, "start")
        objective = inversion.FixedCost(model.classes, (channels, height, width), start, weight=params.mask_weight, patience=30, scale=scale, offset=offset)
        triggers = inversion.invert(run, name, labels=range(model.classes), objective=objective, **shared)
    norms = triggers.norms
    index = inversion.anomaly_index(norms)
    suspects = inversion.flagged(norms, threshold=params.threshold)
    failed = [label for label, rate in zip(triggers.labels, triggers.success, strict=True) if rate < 0.9]
    verdict, reason = judge(norms, suspects, failed, model.classes, params.threshold)
    findings = {
        "verdict": verdict,
        "reason": reason,
        "target": suspects[0] if suspects else None,
        "suspects": suspects,
        "mask_norms": norms,
        "anomaly_index": index.tolist(),
        "success": list(triggers.success),
    }
    run.log(f"{verdict}: {reason}")
    return findings, triggers


def judge(norms: list[float], suspects: list[int], failed: list[int], classes: int, threshold: float) -> tuple[str, str]:
    """Return the verdict and the sentence that explains it.

    Args:
        suspects: flagged labels, smallest mask first.
        failed: labels for which no trigger was found.
    """
    if suspects:
        return "backdoored", f"class {suspects[0]} is reached with a mask of {norms[suspects[0]]:.1f} pixels, anomalously small"
    if classes < 4:
        return "not_fully_examined", f"{classes} classes are too few for an outlier test"
    if failed:
        return "not_fully_examined", f"no trigger was found for classes {failed}; raise `passes`"
    smallest = min(range(classes), key=lambda label: norms[label])
    index = float(inversion.anomaly_index(norms)[smallest])
    if index > 0.75 * threshold:
        return "inconclusive", f"class {smallest} has anomaly index {index:.2f}, close to the threshold of {threshold:g}"
    return "no_evidence", f"the smallest mask, of class {smallest}, has anomaly index {index:.2f}"

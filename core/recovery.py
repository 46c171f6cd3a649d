"""The first stage of the methods that work with a trigger: find the target if need be, then recover what leads to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import inversion, mesa
from core.catalog import Inputs, Outcome
from core.classifier import Classifier
from core.errors import TargetNotFound, TriggerNotFound
from core.images import ImageSet
from core.run import Run
from core.tuning import Repeating, tune

Stamp = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
# Below this, what was found is no trigger: purifying against it would only do harm.
LEAST_SUCCESS = 0.5


class Recovery(Repeating):
    """Parameters of the recovery of a trigger (MCLDef, Eqs. 1 and 2)."""

    target: int | None = Field(default=None, ge=0, le=100_000, title="Target class", description="The backdoor's class if known; else it is inspected.")
    inversion: Literal["mask", "mesa"] = Field(
        default="mask",
        title="Inversion",
        description="`mask`: a mask and a pattern (Eqs. 1 and 2). `mesa`: a distribution of square patches at a known place, drawn anew for each image.",
    )
    mesa_epochs: int = Field(default=10, ge=1, le=10_000, title="MESA's epochs", description="More where the clean images are few.")
    size: int = Field(default=3, ge=1, le=512, title="Patch size", description="Of `mesa`'s square, in pixels.")
    right: int = Field(default=0, ge=0, le=512, title="Right", description="Pixels between `mesa`'s square and the right edge.")
    bottom: int = Field(default=0, ge=0, le=512, title="Bottom", description="Pixels between `mesa`'s square and the lower edge.")
    space: Literal["pixel", "normalized_clip01"] = Field(
        default="pixel",
        title="Trigger space",
        description="`normalized_clip01` blends after normalisation with patterns in [0, 1], as the published code does.",
    )
    mask_weight: float = Field(default=0.01, gt=0, le=10, title="Mask weight", description="lambda of Eq. 2.")
    inversion_epochs: int = Field(default=100, ge=1, le=10_000, title="Inversion epochs", description="At most; inversion stops when the mask does not shrink.")
    inversion_batch: int = Field(default=64, ge=1, le=4096, title="Inversion batch")
    patience: int = Field(
        default=200,
        ge=1,
        le=100_000,
        title="Patience",
        description="Steps without a smaller mask before inversion stops. As published: 30 epochs, which are 1,200 steps on 2,500 images.",
    )
    tolerance: float = Field(default=0.05, ge=0, lt=1, title="Tolerance", description="Share by which a mask must shrink to count as smaller. As published: 0.")


@dataclass(frozen=True)
class Recovered:
    """What leads to the target.

    Attributes:
        stamp: puts it on float images (N, C, H, W) in [0, 1]; a distribution of triggers draws from the generator.
        findings: JSON, for the report.
        triggers: pictures, as in `Outcome`.
    """

    target: int
    stamp: Stamp
    findings: dict[str, Any] = field(default_factory=dict)
    triggers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def recover(run: Run, inputs: Inputs, params: Recovery) -> Recovered:
    """Recover the trigger of the target, which is inspected when it is not given.

    Raises:
        TargetNotFound: when no class stands out.
        TriggerNotFound: when what was found does not lead to the target.
    """
    assert inputs.model is not None and inputs.clean is not None
    teacher, clean = inputs.model.frozen_copy(), inputs.clean
    target, findings = find_target(run, teacher, clean, params.target)
    run.phase("inverting")
    if params.inversion == "mesa":
        return _modelled(run, teacher, clean, target, params, findings)
    triggers = _invert(run, teacher, clean, target, params)
    mask, pattern = triggers.of(target)
    check_success(triggers.success[0], target)
    findings["trigger"] = {"target": target, "mask_norm": triggers.norms[0], "success": triggers.success[0]}
    run.log(f"recovered a trigger of {triggers.norms[0]:.1f} pixels for class {target}", **findings["trigger"])
    return Recovered(target, lambda images, generator: inversion.stamp(images, mask, pattern), findings, {target: (mask, pattern)})


def unlearn(run: Run, inputs: Inputs, params: Recovery, mix: Callable[[torch.Tensor, Stamp, torch.Generator], torch.Tensor], **tuning: Any) -> Outcome:
    """Recover the trigger and fine-tune with true labels on what `mix(images, stamp, generator)` makes of each batch.

    Args:
        tuning: for `tune`.
    """
    assert inputs.model is not None
    found = recover(run, inputs, params)
    model = inputs.model.frozen_copy().requires_grad_(True)
    generator = run.generator("unlearn", "stamp")

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return F.cross_entropy(model(mix(images, found.stamp, generator)).float(), labels)

    run.phase("unlearning")
    history = tune(run, "unlearn", inputs, params, loss, model=model, state={"stamp": generator}, **tuning)
    return Outcome(model=model, findings={"target": found.target, **found.findings, "loss": history}, triggers=found.triggers)


def _modelled(run: Run, teacher: Classifier, clean: ImageSet, target: int, params: Recovery, findings: dict[str, Any]) -> Recovered:
    """Recover a distribution of patches with MESA."""
    place = mesa.Place(params.size, params.right, params.bottom)
    model, success = mesa.model_triggers(run, teacher, clean, target, place, epochs=params.mesa_epochs)
    check_success(success, target)
    findings["trigger"] = {"target": target, "mask_norm": float(params.size**2), "success": success}
    run.log(f"modelled the triggers of class {target}; {success:.1%} of the images follow them", **findings["trigger"])
    return Recovered(target, model.stamp, findings, {target: model.picture(clean.images.shape[1:], run.generator("picture of a trigger"))})


def find_target(run: Run, teacher: Classifier, clean: ImageSet, given: int | None) -> tuple[int, dict[str, Any]]:
    """Return the given target, or the class whose mask is anomalously small when all labels are inverted together; and the findings."""
    if given is not None:
        return given, {}
    run.phase("inspecting")
    triggers = inversion.invert_every_label(run, "inspect all labels", classifier=teacher, clean=clean)
    suspects = inversion.flagged(triggers.norms)
    report = {"mask_norms": triggers.norms, "anomaly_index": inversion.anomaly_index(triggers.norms).tolist()}
    if not suspects:
        raise TargetNotFound(
            "no label's trigger is anomalously small, so there is no target to purify against",
            "Give `target` if you know it, or run `neural_cleanse` to see every label's trigger.",
        )
    run.log(f"class {suspects[0]} stands out", **report)
    return suspects[0], {"inspection": report}


def check_success(success: float, target: int) -> None:
    """Raise `TriggerNotFound` when a trigger sends too few images to the target."""
    if success < LEAST_SUCCESS:
        raise TriggerNotFound(
            f"the best trigger found sends {success:.1%} of the clean images to class {target}; at least {LEAST_SUCCESS:.0%} are needed to purify against it",
            "Check the target; try more `inversion_epochs` or a smaller `mask_weight`; or use a method that needs no trigger, such as ft_sam with `learning_rate` 0.1.",
        )


def _invert(run: Run, teacher: Classifier, clean: ImageSet, target: int, params: Recovery) -> inversion.Triggers:
    """Recover the target's trigger with the fixed mask weight of Eq. 2."""
    scale, offset = pattern_space(teacher, params.space)
    _, channels, height, width = clean.images.shape
    objective = inversion.FixedCost(
        1,
        (channels, height, width),
        run.generator("invert trigger", "start"),
        weight=params.mask_weight,
        patience=math.ceil(params.patience / math.ceil(len(clean) / params.inversion_batch)),
        tolerance=params.tolerance,
        scale=scale,
        offset=offset,
    )
    return inversion.invert(
        run,
        "invert trigger",
        classifier=teacher,
        clean=clean,
        labels=[target],
        objective=objective,
        passes=params.inversion_epochs,
        batch_size=params.inversion_batch,
        augment=params.augmentation(),
    )


def pattern_space(classifier: Classifier, space: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, offset), each (C,), that map a pattern in [0, 1] to pixel space.

    Blending commutes with the affine normalisation, so patterns clipped to [0, 1] after normalisation are the pixel
    patterns `mean + std * p`.
    """
    mean, std = classifier.mean.flatten(), classifier.std.flatten()
    return (torch.ones_like(std), torch.zeros_like(mean)) if space == "pixel" else (std, mean)

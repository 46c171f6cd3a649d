"""MCLDef: invert the trigger, then pull triggered features to the teacher's clean ones, with a few clean images."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import inversion, training
from core.augment import crop_and_flip, none
from core.catalog import Inputs, Need, Outcome, Params, defense
from core.classifier import Classifier
from core.errors import NotEnoughCleanData, TargetNotFound
from core.images import ImageSet
from core.losses import model_contrastive
from core.run import Run


class MCLDef(Params):
    """Parameters. `anchor` 0, `learning_rate` 0.1 and `inversion_epochs` 100 are the published method on CIFAR-10."""

    method: Literal["mcldef"]
    target: int | None = Field(default=None, ge=0, le=100_000, title="Target class", description="The backdoor's class if known; else it is inspected.")
    space: Literal["pixel", "normalized_clip01"] = Field(
        default="pixel",
        title="Trigger space",
        description="`normalized_clip01` blends after normalisation with patterns in [0, 1], as the published code does.",
    )
    mask_weight: float = Field(default=0.01, gt=0, le=10, title="Mask weight", description="lambda of Eq. 2.")
    inversion_epochs: int = Field(default=60, ge=1, le=10_000, title="Inversion epochs", description="As published: 100.")
    inversion_batch: int = Field(default=64, ge=1, le=4096, title="Inversion batch")
    patience: int = Field(default=30, ge=1, le=10_000, title="Patience", description="Epochs without a smaller mask before inversion stops.")
    epochs: int = Field(default=20, ge=1, le=1000, title="Contrastive epochs")
    batch_size: int = Field(default=64, ge=2, le=4096, title="Batch size")
    learning_rate: float = Field(
        default=0.2,
        gt=0,
        le=10,
        title="Learning rate",
        description="Of the first epoch; a tenth until half of the epochs, then a hundredth. As published: 0.1.",
    )
    temperature: float = Field(default=0.5, gt=0, le=10, title="Temperature", description="tau of Eqs. 3 and 4.")
    anchor: float = Field(
        default=4.0,
        ge=0,
        le=100,
        title="Clean anchor",
        description="Weight of a term that holds the student's features of clean images to the teacher's, so that clean accuracy, "
        "above all of the target class, is not given away; 0 is the published method.",
    )
    bn: Literal["train", "frozen", "mixed"] = Field(
        default="train",
        title="BatchNorm mode",
        description="`train`: statistics of triggered images, as published; `frozen`: kept; `mixed`: clean images pass too.",
    )
    augment: bool = Field(default=True, title="Augment", description="Random crop and flip, before stamping.")


@defense(
    title="MCLDef",
    paper="Model-contrastive learning for backdoor elimination (MCLDef), Eqs. 1 to 4",
    needs=(Need.MODEL, Need.CLEAN_IMAGES),
)
def run(run: Run, inputs: Inputs, params: MCLDef) -> Outcome:
    """Purify a model with a recovered trigger and model-contrastive learning; no labels, no cross-entropy."""
    assert inputs.model is not None and inputs.clean is not None
    teacher, clean = inputs.model.frozen_copy(), inputs.clean
    if len(clean) < teacher.classes:
        raise NotEnoughCleanData(
            f"{len(clean)} clean images for {teacher.classes} classes", "Give at least one image a class; the paper uses 5 % of the training set."
        )
    findings: dict[str, Any] = {}
    target = params.target
    if target is None:
        target, findings["inspection"] = _inspect(run, teacher, clean)
    run.phase("inverting")
    triggers = _invert(run, teacher, clean, target, params)
    mask, pattern = triggers.of(target)
    findings["trigger"] = {"target": target, "mask_norm": triggers.norms[0], "success": triggers.success[0]}
    run.log(f"recovered a trigger of {triggers.norms[0]:.1f} pixels for class {target}", **findings["trigger"])
    run.phase("contrasting")
    student, findings["loss"] = eliminate(run, inputs, teacher, mask, pattern, params)
    return Outcome(model=student, findings={"target": target, **findings}, triggers={target: (mask, pattern)})


def eliminate(run: Run, inputs: Inputs, teacher: Classifier, mask: torch.Tensor, pattern: torch.Tensor, params: MCLDef) -> tuple[Classifier, list[float]]:
    """Train the student of stage 2 (Eqs. 3 and 4); return it with each epoch's loss.

    Args:
        mask, pattern: (H, W) and (C, H, W), pixel space.
    """
    assert inputs.clean is not None
    student = teacher.frozen_copy().requires_grad_(True)
    # The head gets no gradient from this loss; weight decay alone must not move it.
    student.head.requires_grad_(False)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=params.learning_rate, momentum=0.9, weight_decay=1e-4)

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        poisoned = inversion.stamp(images, mask, pattern)
        with torch.no_grad():
            z_clean, z_poisoned = teacher.features(torch.cat([images, poisoned])).chunk(2)
        if params.bn != "mixed" and not params.anchor:
            return model_contrastive(student.features(poisoned), z_clean, z_poisoned, temperature=params.temperature)
        z, z_held = student.features(torch.cat([poisoned, images])).chunk(2)
        held = (1 - F.cosine_similarity(z_held.float(), z_clean.float())).mean()
        return model_contrastive(z, z_clean, z_poisoned, temperature=params.temperature) + params.anchor * held

    history = training.fit(
        run,
        "contrast",
        data=inputs.clean,
        loss=loss,
        network=student,
        optimizer=optimizer,
        schedule=training.two_drops(params.learning_rate, params.epochs),
        epochs=params.epochs,
        batch_size=params.batch_size,
        augment=crop_and_flip() if params.augment else none,
        prepare=lambda: student.train(params.bn != "frozen"),
        after_epoch=lambda epoch: inputs.watch(student),
    )
    return student.eval().requires_grad_(True), history


def _inspect(run: Run, teacher: Classifier, clean: ImageSet) -> tuple[int, dict[str, Any]]:
    """Find the target: the label whose mask is anomalously small when all labels are inverted together."""
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
    return suspects[0], report


def _invert(run: Run, teacher: Classifier, clean: ImageSet, target: int, params: MCLDef) -> inversion.Triggers:
    """Recover the target's trigger with the fixed mask weight of Eq. 2."""
    scale, offset = pattern_space(teacher, params.space)
    _, channels, height, width = clean.images.shape
    objective = inversion.FixedCost(
        1,
        (channels, height, width),
        run.generator("invert trigger", "start"),
        weight=params.mask_weight,
        patience=params.patience,
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
        augment=crop_and_flip() if params.augment else none,
    )


def pattern_space(classifier: Classifier, space: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, offset), each (C,), that map a pattern in [0, 1] to pixel space.

    Blending commutes with the affine normalisation, so patterns clipped to [0, 1] after normalisation are the pixel
    patterns `mean + std * p`.
    """
    mean, std = classifier.mean.flatten(), classifier.std.flatten()
    return (torch.ones_like(std), torch.zeros_like(mean)) if space == "pixel" else (std, mean)

"""Stages 2 and 3 of MCLDef: model-contrastive elimination of a known trigger, and correction of the positive pairs."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import training
from core.activations import collect
from core.catalog import Inputs
from core.classifier import Classifier
from core.losses import model_contrastive
from core.recovery import Stamp
from core.run import Run
from core.tuning import Repeating, tune


class Contrast(Repeating):
    """Parameters of the elimination; `anchor` 0 and `calibrate` false are as published on CIFAR-10."""

    temperature: float = Field(default=0.5, gt=0, le=10, title="Temperature", description="tau of Eqs. 3 and 4.")
    first_epochs: int = Field(
        default=1, ge=1, le=1000, title="First epochs", description="At the full rate; 2 as published for GTSRB, whose `learning_rate` is 0.01."
    )
    anchor: float = Field(
        default=2.0,
        ge=0,
        le=100,
        title="Clean anchor",
        description="Weight of a term that holds the student's features of clean images to the teacher's, so that clean accuracy, "
        "above all of the target class, is not given away; 0 is the published method.",
    )
    settling_epochs: int = Field(
        default=0,
        ge=0,
        le=1000,
        title="Settling epochs",
        description="Epochs afterwards with a clean anchor four times as strong, at a fortieth of the rate. They win accuracy back, and may leave "
        "a little more of a trigger that was recovered in part.",
    )
    bn: Literal["train", "frozen", "mixed"] = Field(
        default="train",
        title="BatchNorm mode",
        description="`train`: statistics of triggered images, as published, and of clean ones where a clean anchor needs them; `frozen`: kept; `mixed`: clean images pass in any case.",
    )
    calibrate: bool = Field(
        default=True,
        title="Calibrate the head",
        description="Afterwards shift the head's biases until every class is predicted as often on the clean images as before. Features are pushed "
        "away from the target's direction, which clean images of the target class share: without this that class loses accuracy.",
    )


def eliminate(run: Run, inputs: Inputs, teacher: Classifier, stamp: Stamp, params: Contrast) -> tuple[Classifier, list[float]]:
    """Train the student of stage 2 (Eqs. 3 and 4); return it with each epoch's loss. No label is used."""
    student = teacher.frozen_copy().requires_grad_(True)
    # The head gets no gradient from this loss; weight decay alone must not move it.
    student.head.requires_grad_(False)
    generator = run.generator("contrast", "stamp")

    def loss(images: torch.Tensor, anchor: float) -> torch.Tensor:
        poisoned = stamp(images, generator)
        with torch.no_grad():
            z_clean, z_poisoned = teacher.features(torch.cat([images, poisoned])).chunk(2)
        if params.bn != "mixed" and not anchor:
            return model_contrastive(student.features(poisoned), z_clean, z_poisoned, temperature=params.temperature)
        z, z_held = student.features(torch.cat([poisoned, images])).chunk(2)
        held = (1 - F.cosine_similarity(z_held.float(), z_clean.float())).mean()
        return model_contrastive(z, z_clean, z_poisoned, temperature=params.temperature) + anchor * held

    tuning: dict[str, Any] = {
        "model": student,
        "parameters": [parameter for parameter in student.parameters() if parameter.requires_grad],
        "prepare": lambda: student.train(params.bn != "frozen"),
        "state": {"stamp": generator},
    }
    schedule = training.two_drops(params.learning_rate, params.epochs, first=params.first_epochs)
    history = tune(run, "contrast", inputs, params, lambda images, labels: loss(images, params.anchor), schedule=schedule, **tuning)
    if params.settling_epochs:
        student.head.requires_grad_(False)
        rate, settling = params.learning_rate / 40, params.model_copy(update={"epochs": params.settling_epochs})
        held_more = 4 * params.anchor
        history += tune(run, "settle", inputs, settling, lambda images, labels: loss(images, held_more), schedule=training.steps((0, rate)), **tuning)
    return student, history


def correct(run: Run, inputs: Inputs, teacher: Classifier, student: Classifier, stamp: Stamp, params: Contrast, *, epochs: int, rate: float) -> list[float]:
    """Pull the student's triggered features to the teacher's clean ones (stage 3 of MCLDef+, Eqs. 5 and 6); return each epoch's loss."""
    student.head.requires_grad_(False)
    generator = run.generator("correct", "stamp")

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher.features(images)
        return -F.cosine_similarity(student.features(stamp(images, generator)).float(), wanted.float()).mean()

    changed: dict[str, Any] = {"epochs": epochs, "learning_rate": rate}
    return tune(
        run,
        "correct",
        inputs,
        params.model_copy(update=changed),
        loss,
        model=student,
        parameters=[parameter for parameter in student.parameters() if parameter.requires_grad],
        schedule=training.steps((0, rate), ((epochs + 1) // 2, rate / 10)),
        prepare=lambda: student.train(params.bn != "frozen"),
        state={"stamp": generator},
    )


def calibrate(run: Run, inputs: Inputs, teacher: Classifier, student: Classifier) -> list[float]:
    """Shift the student's head biases, in place, so that its mean probability of every class on the clean images is the teacher's; return the shifts.

    Raises `OutputsNotFinite`.
    That is where the cross-entropy with the teacher's probabilities has its minimum over the biases. No label is used, and one number a
    class is too little to learn a trigger from.
    """
    assert inputs.clean is not None
    clean = inputs.clean

    def shifts() -> list[float]:
        wanted = collect(run, teacher, clean).softmax(1).double()
        logits = collect(run, student.eval(), clean).double()
        shift = torch.zeros(student.classes, dtype=torch.float64, device=logits.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([shift], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            # The small term decides the free constant, and keeps the shift of a class nobody predicts finite.
            loss = F.cross_entropy(logits + shift, wanted) + 1e-4 * shift.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return [round(value, 6) for value in shift.tolist()]

    found: list[float] = run.once("calibrate", shifts)
    with torch.no_grad():
        student.head.bias.add_(torch.tensor(found, dtype=student.head.bias.dtype, device=student.head.bias.device))
    inputs.watch(student)
    return found

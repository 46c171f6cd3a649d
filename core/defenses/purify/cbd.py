"""CBD: purify the backbone with contrastive losses and adversarial views; the images need no labels."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core import training
from core.adversarial import ascend
from core.augment import simclr
from core.catalog import Inputs, Need, Outcome, defense
from core.classifier import Classifier
from core.errors import LabelsMissing
from core.losses import info_nce
from core.probe import adapt, probe
from core.run import Run
from core.training import mixed_precision
from core.tuning import Tuning, epochs_field, rate_field, tune


class CBD(Tuning):
    """Parameters; the defaults are those for CIFAR-10 with a supervised backbone."""

    method: Literal["cbd"]
    epochs: int = epochs_field(15)
    batch_size: int = Field(default=128, ge=2, le=4096, title="Batch size")
    learning_rate: float = rate_field(0.02, "Constant.")
    augment: bool = Field(default=False, title="Crop and flip too", description="The views are augmented anyway.")
    pull: float = Field(default=0.3, ge=0, le=100, title="Pull", description="lambda 1, of Eq. 2.")
    distil: float = Field(default=0.5, ge=0, le=100, title="Distil", description="lambda 2, of Eq. 3.")
    tune: float = Field(default=0.2, ge=0, le=100, title="Self-supervised fine-tuning", description="lambda 3, of Eq. 4.")
    temperature: float = Field(default=0.5, gt=0, le=10, title="Temperature")
    epsilon: float = Field(default=8 / 255, gt=0, le=1, title="Epsilon", description="L-infinity bound of the adversarial view, in [0, 1].")
    l2: float = Field(
        default=0, ge=0, le=1000, title="L2 bound",
        description="Instead of `epsilon`, of pixels in [0, 1]; the paper's ablation has 4.016, which is 1024 / 255, and `step` 0.4016. 0: none.",
    )  # fmt: skip
    step: float = Field(default=0.1, gt=0, le=1, title="Step size", description="In [0, 1]; the paper gives 0.1 without a unit.")
    steps: int = Field(default=20, ge=1, le=1000, title="PGD steps", description="As published 20, and 100 for a self-supervised backbone.")
    symmetric: bool = Field(default=False, title="Symmetric", description="Average the loss over both directions.")
    head: Literal["adapt", "keep", "probe"] = Field(
        default="adapt",
        title="Head",
        description="`adapt`: train it on until the purified backbone predicts on the clean images what the suspect model does, no label is used; `keep` it; `probe`: "
        "train a new one on the labels of the clean images, as published.",
    )


@defense(
    title="CBD",
    paper="Contrastive backdoor defense (CBD) for supervised and self-supervised backbones, Eqs. 1 to 4 and 7",
    needs=(Need.MODEL, Need.CLEAN_IMAGES),
    encoders=True,
    caution="On small models with 300 clean images, and on a WRN-16-1 with 2,500, patches survived, on small ones blends, too; keeping the head as it is cost them up to 16 points of accuracy.",
)
def run(run: Run, inputs: Inputs, params: CBD) -> Outcome:
    """Pull adversarial views to their clean ones, hold the clean ones to the original backbone, and tune contrastively; no labels."""
    assert inputs.model is not None and inputs.clean is not None
    if params.head == "probe" and inputs.clean.labels is None:
        raise LabelsMissing("a linear probe needs labels", 'Upload labelled clean images, or keep the head (`"head": "keep"`).')
    teacher = inputs.model.frozen_copy()
    student = inputs.model.frozen_copy().requires_grad_(True)
    student.head.requires_grad_(False)
    generator = run.generator("purify", "views")
    view = simclr(mirror=params.mirror)

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        first, second, third = (view(images, generator) for _ in range(3))
        attacked = adversarial_view(student, third, first, params)
        # One pass: BatchNorm sees clean and adversarial views together.
        a, b, c = student.features(torch.cat([first, second, attacked])).float().chunk(3)
        with torch.no_grad():
            wanted = teacher.features(first).float()
        total = params.pull * info_nce(a.detach(), c, temperature=params.temperature, symmetric=params.symmetric)
        total = total + params.distil * info_nce(a, wanted, temperature=params.temperature, symmetric=params.symmetric)
        return total + params.tune * info_nce(a, b, temperature=params.temperature, symmetric=params.symmetric)

    run.phase("purifying")
    history = tune(
        run,
        "purify",
        inputs,
        params,
        loss,
        model=student,
        parameters=[parameter for parameter in student.parameters() if parameter.requires_grad],
        schedule=training.steps((0, params.learning_rate)),
        weight_decay=5e-4,
        state={"views": generator},
    )
    findings = {"loss": history}
    if params.head != "keep":
        run.phase("probing")
        probing = probe(run, "probe", student, inputs.clean) if params.head == "probe" else adapt(run, "adapt", student, inputs.clean, teacher)
        findings["probe_loss"] = probing
        inputs.watch(student)
    return Outcome(model=student, findings=findings)


def adversarial_view(student: Classifier, images: torch.Tensor, anchors: torch.Tensor, params: CBD) -> torch.Tensor:
    """Return images (N, C, H, W) in [0, 1] moved within their bound so that they no longer match their anchors (Eq. 1).

    BatchNorm keeps its statistics: the attack is on the function that will be deployed.
    """
    modes = student.training
    student.eval()
    with torch.no_grad(), mixed_precision(images.device):
        wanted = student.features(anchors).float()

    def loss(moved: torch.Tensor) -> torch.Tensor:
        return info_nce(student.features(moved).float(), wanted, temperature=params.temperature)

    bound: Literal["l2", "linf"] = "l2" if params.l2 else "linf"
    moved = ascend(images, loss, epsilon=params.l2 or params.epsilon, step=params.step, steps=params.steps, norm=bound)
    student.train(modes)
    return moved

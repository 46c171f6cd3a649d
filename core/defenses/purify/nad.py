"""NAD: the attention maps of a fine-tuned teacher hold the student's, which is fine-tuned too."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core.augment import cutout
from core.catalog import Inputs, Need, Outcome, defense
from core.errors import LayerMissing
from core.images import as_floats
from core.run import Run
from core.training import steps
from core.tuning import Repeating, cross_entropy, rate_field, tune

# Pixels of the images that the published betas are made for.
PIXELS = 32 * 32


class NAD(Repeating):
    """Parameters; `cutout` and `nesterov` belong to the published code, and MCLDef's comparison is taken to be without them."""

    method: Literal["nad"]
    learning_rate: float = rate_field(
        0.1, "Of the teacher's first epoch (then a tenth, and a hundredth from half of its epochs on) and of the student's first two (then a tenth)."
    )
    teacher_epochs: int = Field(default=10, ge=1, le=1000, title="Teacher's epochs")
    betas: tuple[float, ...] = Field(
        default=(500.0, 1000.0, 1000.0), min_length=1, max_length=8, title="Betas",
        description="Weights of the last residual groups whose maps have more than one pixel, in order.",
    )  # fmt: skip
    scale_betas: bool = Field(
        default=True,
        title="Scale the betas",
        description="An attention map has norm one and its loss is a mean over its pixels, so the same beta weighs more on smaller maps, and tears features apart. Betas are for "
        "images of 32x32; on smaller ones they are multiplied by the share of pixels squared: once for that mean, once since accuracy was lost without it. As published: off.",
    )
    power: float = Field(default=2.0, gt=0, le=10, title="Power", description="p of the attention map.")
    cutout: bool = Field(default=False, title="Cutout", description="A grey square of three pixels in every training image.")
    nesterov: bool = Field(default=False, title="Nesterov momentum")


@defense(
    title="Neural attention distillation",
    paper="Li et al., Neural Attention Distillation, ICLR 2021",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="Its first epochs have a high rate: a WRN-16-1 with 2,500 clean images lost 1 to 8 points of accuracy. Small models with 300 lost up to 3.2; without crops (`augment`) they kept nearly every backdoor, an ASR of 49 to 100 %.",
)
def run(run: Run, inputs: Inputs, params: NAD) -> Outcome:
    """Fine-tune a teacher, then fine-tune the model with its attention maps held to the teacher's."""
    assert inputs.model is not None and inputs.clean is not None
    suspect = inputs.model
    with torch.no_grad():
        sizes = [tuple(stage.shape[2:]) for stage in suspect.frozen_copy().stages(as_floats(inputs.clean.images[:2]))]
    groups = [group for group, size in enumerate(sizes) if max(size, default=1) > 1][-len(params.betas) :]
    if len(groups) < len(params.betas):
        raise LayerMissing(
            f"{suspect.architecture.name} has maps of {sizes}; NAD needs {len(params.betas)} of more than one pixel",
            "Give fewer `betas`, or another method.",
        )
    pixels = inputs.clean.images[0, 0].numel()
    betas = [beta * (min(pixels / PIXELS, 1) ** 2 if params.scale_betas else 1) for beta in params.betas]
    teacher = suspect.frozen_copy().requires_grad_(True)
    run.phase("fine-tuning the teacher")
    teaching = params.model_copy(update={"epochs": params.teacher_epochs})
    taught = tune(run, "teacher", inputs, teaching, cross_entropy(teacher), model=teacher)
    teacher.requires_grad_(False)
    student = suspect.frozen_copy().requires_grad_(True)
    generator = run.generator("distil", "cutout")

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        if params.cutout:
            images = cutout(3)(images, generator)
        with torch.no_grad():
            wanted = teacher.stages(images)
        maps = student.stages(images)
        total = F.cross_entropy(student.head(student.network.pool(maps[-1])).float(), labels)
        for group, beta in zip(groups, betas, strict=True):
            total = total + beta * F.mse_loss(attention(maps[group], params.power), attention(wanted[group], params.power))
        return total

    rate = params.learning_rate
    optimizer = torch.optim.SGD(student.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, nesterov=params.nesterov)
    run.phase("distilling")
    history = tune(
        run, "distil", inputs, params, loss, model=student, optimizer=optimizer, schedule=steps((0, rate), (2, rate / 10)), state={"cutout": generator}
    )  # fmt: skip
    return Outcome(model=student, findings={"teacher_loss": taught, "loss": history})


def attention(maps: torch.Tensor, power: float = 2.0) -> torch.Tensor:
    """Return the attention maps (N, H * W) of feature maps (N, C, H, W): sum over channels of |F|^p, divided by its norm."""
    summed = maps.float().abs().pow(power).sum(1).flatten(1)
    return summed / (summed.norm(dim=1, keepdim=True) + 1e-6)

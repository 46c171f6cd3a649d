"""NPD: one linear layer, learnt inside the frozen model, turns away what adversarial examples and triggers share."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.nn.utils import parametrize

from core import training
from core.activations import collect
from core.adversarial import within
from core.catalog import Inputs, Need, Outcome, defense
from core.classifier import Classifier
from core.errors import LayerMissing
from core.images import as_floats
from core.losses import unlikelihood
from core.run import Run
from core.tuning import Repeating, cross_entropy, epochs_field, rate_field, tune


class NPD(Repeating):
    """Parameters; the defaults are those for CIFAR-10."""

    method: Literal["npd"]
    target: int | None = Field(default=None, ge=0, le=100_000, title="Target class", description="If known; else the most frequent second choice.")
    warm_epochs: int = Field(default=5, ge=1, le=1000, title="Warm-up epochs", description="Cross-entropy alone, at a hundredth of the rate.")
    epochs: int = epochs_field(50)
    batch_size: int = Field(default=128, ge=2, le=4096, title="Batch size")
    learning_rate: float = rate_field(0.01, "Constant.")
    augment: bool = Field(default=False, title="Augment", description="Random crop and flip.")
    norm: float = Field(default=3.0, gt=0, le=1000, title="Norm", description="L2 bound of the adversarial change: 3 on CIFAR, 5 on GTSRB, 6 on Tiny ImageNet.")
    step: float = Field(default=0.1, gt=0, le=1, title="Step size")
    steps: int = Field(default=2, ge=1, le=1000, title="Steps", description="At most; fewer when 60 % of a batch have reached their second choice.")
    adversarial_weight: float = Field(default=0.4, ge=0, le=100, title="Weight of adversarial images", description="lambda 2.")
    wrong_weight: float = Field(default=0.4, ge=0, le=100, title="Weight against the wrong class", description="lambda 3.")
    target_weight: float = Field(default=0.4, ge=0, le=100, title="Weight against the target", description="lambda 4.")


@defense(
    title="Neural polarizer",
    paper="Zhu et al., Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying Poisoned Features, NeurIPS 2023",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="On small models with 300 clean images patches and blends often survived; a WRN-16-1 for CIFAR-10 with 2,500 lost 7 points of accuracy and kept 13 to 34 % of a patch.",
)
def run(run: Run, inputs: Inputs, params: NPD) -> Outcome:
    """Learn a linear map of one layer's input with adversarial examples, everything else frozen, and fold it into the next convolution.

    The published layer has a BatchNorm too. Its shift cannot be folded into a padded convolution, and without folding the purified model
    would not have its own architecture any more; so there is none here.
    """
    assert inputs.model is not None and inputs.clean is not None
    model = inputs.model.frozen_copy()
    conv = _place(model, as_floats(inputs.clean.images[:1]))
    polarizer = Polarizer(conv.in_channels).to(run.device)
    parametrize.register_parametrization(conv, "weight", polarizer)
    target = _second_choice(run, model, inputs) if params.target is None else params.target

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        with torch.no_grad():
            logits = model(images).float()
        moved = targeted(model, images, logits.topk(2).indices[:, 1], norm=params.norm, step=params.step, steps=params.steps)
        plain, attacked = model(torch.cat([images, moved])).float().chunk(2)
        first = attacked.topk(2).indices
        wrong = torch.where(first[:, 0] == labels, first[:, 1], first[:, 0])
        against_wrong = unlikelihood(attacked, wrong).mean()
        # An image of the target class may well look like one.
        others = labels != target
        against_target = (unlikelihood(attacked, torch.full_like(labels, target)) * others).sum() / others.sum().clamp(min=1)
        total = F.cross_entropy(plain, labels) + params.adversarial_weight * F.cross_entropy(attacked, logits.argmax(1))
        return total + params.wrong_weight * against_wrong + params.target_weight * against_target

    run.phase("warming up")
    warm = params.model_copy(update={"epochs": params.warm_epochs, "learning_rate": params.learning_rate / 100})
    shared: dict[str, Any] = {"model": model, "parameters": list(polarizer.parameters()), "weight_decay": 5e-4, "prepare": model.eval}
    first = tune(run, "warm up", inputs, warm, cross_entropy(model), schedule=training.steps((0, warm.learning_rate)), **shared)
    model.requires_grad_(False)
    polarizer.requires_grad_(True)
    run.phase("polarizing")
    history = tune(run, "polarize", inputs, params, loss, schedule=training.steps((0, params.learning_rate)), **shared)
    parametrize.remove_parametrizations(conv, "weight")
    return Outcome(model=model.requires_grad_(True), findings={"target": target, "warm_up_loss": first, "loss": history})


class Polarizer(nn.Module):
    """A linear map of the channels that enter a convolution, as part of its weight; the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.eye(channels))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight (out, in, h, w) of the convolution after the map."""
        return torch.einsum("oihw,ij->ojhw", weight, self.map)


def targeted(model: Classifier, images: torch.Tensor, wanted: torch.Tensor, *, norm: float, step: float, steps: int) -> torch.Tensor:
    """Return images (N, C, H, W) in [0, 1] moved within an L2 ball towards the classes `wanted` (N,), until 60 % are there."""
    moved = images
    for _ in range(steps):
        moved = moved.detach().requires_grad_(True)
        logits = model(moved).float()
        if float((logits.argmax(1) == wanted).float().mean()) > 0.6:
            break
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, wanted, reduction="sum"), moved)
        moved = (images + within(moved.detach() - step * slope.sign() - images, norm)).clamp(0, 1)
    return moved.detach()


def _place(model: Classifier, images: torch.Tensor) -> nn.Conv2d:
    """Return the convolution before the last one that runs: in a ResNet, the first of its last block."""
    ran: list[nn.Conv2d] = []
    hooks = [
        module.register_forward_hook(lambda conv, args, output: ran.append(conv))
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1
    ]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    if len(ran) < 2:
        raise LayerMissing(f"{model.architecture.name} has no two convolutions to put a layer between", "Choose another method, such as ft_sam.")
    return ran[-2]


def _second_choice(run: Run, model: Classifier, inputs: Inputs) -> int:
    """Return the class that is most often the second most likely one: a backdoor's target lies close to everything."""
    assert inputs.clean is not None
    return int(collect(run, model, inputs.clean).topk(2).indices[:, 1].bincount().argmax())

"""FT-SAM: fine-tune with sharpness-aware minimisation, which moves the large weights that a backdoor sits in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from core import training
from core.catalog import Inputs, Need, Outcome, defense
from core.classifier import Classifier
from core.run import Run
from core.tuning import Repeating, epochs_field, rate_field, tune


class FTSAM(Repeating):
    """Parameters; the defaults are those for CIFAR-10."""

    method: Literal["ft_sam"]
    epochs: int = epochs_field(100)
    batch_size: int = Field(default=256, ge=2, le=4096, title="Batch size")
    learning_rate: float = rate_field(0.01, "Of the first step.")
    rho: float = Field(
        default=2.0, gt=0, le=1000, title="Rho", description="How far the weights are moved against the loss: 2 on CIFAR, 8 on GTSRB and Tiny ImageNet."
    )
    schedule: Literal["epochs", "steps"] = Field(
        default="epochs",
        title="Schedule",
        description="`epochs`: the rate falls along one cosine. `steps`: as BackdoorBench has it, along a cosine of 100 steps and back again, over and over.",
    )
    smoothing: float = Field(default=0.1, ge=0, lt=1, title="Label smoothing")


@defense(
    title="FT-SAM",
    paper="Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization, ICCV 2023",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="With its published rate of 0.01 it left 47 and 90 % of a patch, and 95 % of stripes, in a WRN-16-1 for CIFAR-10; with 0.1 4 and 29 %. Without `augment` a model that makes "
    "no errors on its clean images keeps its backdoor; mirrored digits cost small models 4 points of accuracy.",
)
def run(run: Run, inputs: Inputs, params: FTSAM) -> Outcome:
    """Fine-tune so that the loss is low in a neighbourhood of the weights that is wide where weights are large."""
    assert inputs.model is not None and inputs.clean is not None
    model = inputs.model.frozen_copy().requires_grad_(True)
    optimizer = AdaptiveSam(model.parameters(), lr=params.learning_rate, momentum=0.9, weight_decay=5e-4, rho=params.rho)

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        here = F.cross_entropy(model(images).float(), labels, label_smoothing=params.smoothing)
        optimizer.ascend(torch.autograd.grad(here, optimizer.weights))
        with _statistics_kept(model):
            return F.cross_entropy(model(images).float(), labels, label_smoothing=params.smoothing)

    steps = max(len(params.epoch(inputs.clean)) // params.batch_size, 1)
    rate = params.learning_rate
    schedule = training.cosine(params.epochs, rate) if params.schedule == "epochs" else training.waves(rate, steps / 100)
    run.phase("fine-tuning")
    history = tune(run, "fine-tune", inputs, params, loss, model=model, optimizer=optimizer, schedule=schedule)
    return Outcome(model=model, findings={"loss": history})


class AdaptiveSam(torch.optim.SGD):
    """SGD whose gradient is taken at w + e with e = rho * w^2 g / ||abs(w) g|| (adaptive SAM, Kwon et al., ICML 2021).

    Call `ascend` with the gradient at w, compute the loss again, and `step` returns to w before it moves.
    """

    def __init__(self, parameters: Iterator[nn.Parameter], *, rho: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._rho = rho
        self._moved: list[torch.Tensor] = []

    @property
    def weights(self) -> list[torch.Tensor]:
        """Everything that is trained, in order."""
        return [weight for group in self.param_groups for weight in group["params"]]

    @torch.no_grad()
    def ascend(self, slopes: tuple[torch.Tensor, ...]) -> None:
        """Move every weight to w + e; `slopes` are the gradients at w."""
        norm = torch.stack([(weight.abs() * slope).norm() for weight, slope in zip(self.weights, slopes, strict=True)]).norm()
        self._moved = [self._rho * weight.square() * slope / (norm + 1e-12) for weight, slope in zip(self.weights, slopes, strict=True)]
        for weight, moved in zip(self.weights, self._moved, strict=True):
            weight.add_(moved)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Go back to w and take SGD's step with the gradient found at w + e."""
        for weight, moved in zip(self.weights, self._moved, strict=True):
            weight.sub_(moved)
        self._moved = []
        return super().step(closure)


@contextmanager
def _statistics_kept(model: Classifier) -> Iterator[None]:
    """Let a forward pass in train mode leave BatchNorm's running statistics alone."""
    layers = [(layer, layer.momentum) for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer, _ in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in layers:
            layer.momentum = momentum

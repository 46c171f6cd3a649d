"""What the methods that train on the clean images share: parameters, optimizer, schedule, augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from core import training
from core.augment import Augment, Mirroring, crop_and_flip, none
from core.catalog import Inputs
from core.classifier import Classifier
from core.images import ImageSet
from core.run import Run
from core.training import Loss, Schedule


def epochs_field(default: int, what: str = "Epochs") -> Any:
    """Return the field `epochs` with this method's default."""
    return Field(default=default, ge=1, le=1000, title=what)


def rate_field(default: float, description: str = "Of the first epoch; a tenth until half of the epochs, then a hundredth.") -> Any:
    """Return the field `learning_rate` with this method's default."""
    return Field(default=default, gt=0, le=10, title="Learning rate", description=description)


def epoch_images_field() -> Any:
    """Return the field `epoch_images`, for methods whose schedule does harm, or nothing, when it has only a few steps."""
    return Field(
        default=2500,
        ge=0,
        le=1_000_000,
        title="Images an epoch",
        description="Clean images that are fewer than four fifths of this are gone through several times an epoch, until it has as many: the schedule is made for that "
        "number of steps. 0: once.",
    )


class Tuning(Mirroring):
    """Parameters of every method that trains on the clean images; the defaults are those of MCLDef's comparison."""

    epochs: int = epochs_field(20)
    batch_size: int = Field(default=64, ge=2, le=4096, title="Batch size")
    learning_rate: float = rate_field(0.1)
    augment: bool = Field(default=True, title="Augment", description="Random crop and flip.")

    def augmentation(self) -> Augment:
        """Return what an image goes through before a step."""
        return crop_and_flip(mirror=self.mirror) if self.augment else none

    def epoch(self, images: ImageSet) -> ImageSet:
        """Return what is gone through in one epoch."""
        return images


class Repeating(Tuning):
    """Parameters of those whose schedule does harm, or nothing, when it has only a few steps."""

    epoch_images: int = epoch_images_field()

    def epoch(self, images: ImageSet) -> ImageSet:
        """Return the images as often after themselves as the schedule needs."""
        return images.repeated(self.epoch_images)


def tune(
    run: Run,
    name: str,
    inputs: Inputs,
    params: Tuning,
    loss: Loss,
    *,
    model: Classifier,
    data: ImageSet | None = None,
    parameters: Iterable[torch.nn.Parameter] | None = None,
    schedule: Schedule | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    weight_decay: float = 1e-4,
    prepare: Callable[[], object] | None = None,
    mixed: bool = True,
    state: Mapping[str, Any] = MappingProxyType({}),
) -> list[float]:
    """Minimise `loss` over the clean images with SGD (momentum 0.9); return each epoch's mean loss. See `training.fit`.

    Args:
        model: what is changed; it is left in eval mode with all gradients on.
        data: other images than the clean ones.
        parameters: what the optimizer changes (all of the model's).
        schedule: MCLDef's two drops unless given. optimizer: another than SGD.
        prepare: sets the modes before an epoch (train mode unless given).
    """
    assert inputs.clean is not None
    trained = model.parameters() if parameters is None else parameters
    history = training.fit(
        run,
        name,
        data=params.epoch(inputs.clean if data is None else data),
        loss=loss,
        network=model,
        optimizer=optimizer or torch.optim.SGD(trained, lr=params.learning_rate, momentum=0.9, weight_decay=weight_decay),
        schedule=schedule or training.two_drops(params.learning_rate, params.epochs),
        epochs=params.epochs,
        batch_size=params.batch_size,
        augment=params.augmentation(),
        prepare=prepare or model.train,
        after_epoch=lambda epoch: inputs.watch(model),
        mixed=mixed,
        state=state,
    )
    model.eval().requires_grad_(True)
    return history


def cross_entropy(model: Classifier, *, smoothing: float = 0.0) -> Loss:
    """Return the loss of plain supervised training."""

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return F.cross_entropy(model(images).float(), labels, label_smoothing=smoothing)

    return loss

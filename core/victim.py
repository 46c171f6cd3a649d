"""Train a victim: a model of any architecture from a (poisoned) training set, with the published recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from core import architectures, training
from core.augment import Mirroring, crop_and_flip, none
from core.classifier import Classifier, Preprocessing
from core.errors import BadDataset
from core.images import ImageSet
from core.run import Run


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        marks: (first epoch, learning rate) steps; empty for `one_cycle` or `cosine` from `rate`.
        augment: whether images are cropped (4 pixels of padding) and, unless `mirror` is false, mirrored.
    """

    epochs: int
    batch_size: int
    rate: float
    schedule: Literal["one_cycle", "cosine", "steps"]
    marks: tuple[tuple[int, float], ...] = ()
    optimizer: Literal["sgd", "adam"] = "sgd"
    weight_decay: float = 1e-4
    nesterov: bool = False
    augment: bool = False
    mirror: bool = True


# The papers' own, and two that two CPU cores finish.
RECIPES = {
    "cpu": Recipe(epochs=6, batch_size=128, rate=0.2, schedule="one_cycle", weight_decay=5e-4, nesterov=True),
    "cpu-augmented": Recipe(epochs=6, batch_size=128, rate=0.2, schedule="one_cycle", weight_decay=5e-4, nesterov=True, augment=True),
    "mcldef": Recipe(epochs=50, batch_size=64, rate=0.1, schedule="steps", marks=((0, 0.1), (20, 0.01), (35, 0.001))),
    "mcldef-gtsrb": Recipe(epochs=50, batch_size=64, rate=0.01, schedule="steps", marks=((0, 0.01), (20, 0.001), (35, 0.0001))),
    "mcldef-augmented": Recipe(epochs=100, batch_size=64, rate=0.1, schedule="steps", marks=((0, 0.1), (20, 0.01), (70, 0.001)), augment=True),
    "dbr": Recipe(epochs=200, batch_size=128, rate=0.01, schedule="steps", marks=((0, 0.01), (100, 1e-3), (150, 1e-4)), weight_decay=5e-4, augment=True),
    "cbd": Recipe(epochs=200, batch_size=128, rate=0.1, schedule="steps", marks=((0, 0.1), (100, 0.01), (150, 1e-3)), weight_decay=5e-4, augment=True),
    "trap-and-replace": Recipe(epochs=200, batch_size=256, rate=1e-3, schedule="cosine", optimizer="adam", weight_decay=5e-4, augment=True),
}


class Training(Mirroring):
    """Parameters of the defenses that train a classifier on the whole suspect set."""

    architecture: str = Field(default="resnet18-cifar", max_length=64, title="Architecture", description="By its name in the catalogue.")
    recipe: Literal["cpu", "mcldef", "mcldef-augmented", "dbr", "cbd", "trap-and-replace"] = Field(
        default="dbr", title="Recipe", description="Of which published training; `cpu` is what two cores finish."
    )
    training_epochs: int | None = Field(
        default=None, ge=1, le=1000, title="Epochs of the classifier", description="Instead of the recipe's own; its steps move with it."
    )

    def schedule(self) -> Recipe:
        """Return the recipe with the wanted number of epochs."""
        recipe = replace(RECIPES[self.recipe], mirror=self.mirror)
        return shortened(recipe, self.training_epochs) if self.training_epochs else recipe


def untrained(run: Run, purpose: str, architecture: str, data: ImageSet, preprocessing: Preprocessing) -> Classifier:
    """Return a new classifier for a set's images and classes, on the run's device; seed and purpose decide its first weights.

    Raises `ArchitectureUnknown`.
    """
    described = architectures.named(architecture, classes=max(data.classes, 2), channels=data.images.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=run.generator(purpose, "weights"))))
        return Classifier(described.build(), described, preprocessing).to(run.device)


def train(run: Run, data: ImageSet, *, architecture: str, preprocessing: Preprocessing, recipe: Recipe, name: str = "victim") -> Classifier:
    """Return a classifier trained with cross-entropy on `data`, as a resumable stage; the seed of the run decides its first weights.

    Raises:
        ArchitectureUnknown: when no architecture has that name.
        BadDataset: when the set has no labels or too few images for a step.
    """
    if data.labels is None or data.classes < 2:
        raise BadDataset("a classifier needs labels of at least two classes", "Give a labelled training set.")
    described = architectures.named(architecture, classes=data.classes, channels=data.images.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        classifier = Classifier(described.build(), described, preprocessing).to(run.device)

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return F.cross_entropy(classifier(images).float(), labels)

    training.fit(
        run, name, data=data.placed(run.device), loss=loss, network=classifier, optimizer=optimizer(classifier, recipe), schedule=rates(recipe),
        epochs=recipe.epochs, batch_size=recipe.batch_size, augment=crop_and_flip(mirror=recipe.mirror) if recipe.augment else none, prepare=classifier.train,
    )  # fmt: skip
    return classifier.eval()


def shortened(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe with another number of epochs, its steps moved in proportion."""
    marks = tuple((round(first * epochs / recipe.epochs), rate) for first, rate in recipe.marks)
    return replace(recipe, epochs=epochs, marks=marks)


def optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return a recipe's optimizer of all parameters of a network."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(network.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov)


def rates(recipe: Recipe) -> training.Schedule:
    """Return a recipe's learning rate at an epoch."""
    if recipe.schedule == "steps":
        return training.steps(*recipe.marks)
    if recipe.schedule == "cosine":
        return training.cosine(recipe.epochs, recipe.rate)
    return training.one_cycle(recipe.epochs, recipe.rate)

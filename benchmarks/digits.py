"""A small backdoored model on real images that ship with scikit-learn: victims for the demo and the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core import images, poisoning, victim, weights
from core.attacks.badnets import BadNets
from core.classifier import Preprocessing
from core.images import ImageSet
from core.run import Run

SIZE = 16
# Of classifiers of one channel that take values as they are.
GREY = Preprocessing((0.0,), (1.0,), "unit")


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, 16x16 grey: what the attacker trained on, what the user keeps clean, what is measured on."""

    train: ImageSet
    clean: ImageSet
    test: ImageSet


def load(seed: int = 0) -> Digits:
    """Return scikit-learn's 1,797 digits, split at random into 1,000 / 300 / 497."""
    data = shuffled(seed)
    return Digits(*(data.subset(part) for part in torch.arange(len(data)).split([1000, 300, len(data) - 1300])))


def two() -> tuple[ImageSet, ImageSet]:
    """Return 1,300 digits to train on and 497 to measure on."""
    data = shuffled(0)
    train, test = torch.arange(len(data)).split([1300, len(data) - 1300])
    return data.subset(train), data.subset(test)


def shuffled(seed: int) -> ImageSet:
    """Return all digits in a random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = np.rint(found.images * (255 / 16)).astype(np.uint8)
    large = small.repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)[..., None]
    data = images.from_arrays(large, found.target, tuple("0123456789"))
    return data.subset(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)))


def poisoned(data: ImageSet, attack: BadNets) -> ImageSet:
    """Return the set with the attack's poison."""
    return poisoning.poison(data, poisoning.plan(Run(device="cpu"), attack, data)).data


def trained(data: ImageSet, path: Path, *, seed: int = 0, epochs: int = 30) -> None:
    """Train a WRN-10-1 on the data and write it as safetensors."""
    recipe = victim.Recipe(epochs=epochs, batch_size=64, rate=0.1, schedule="one_cycle", weight_decay=5e-4, nesterov=True)
    run = Run(seed=seed, device="cpu")
    weights.save(victim.train(run, data, architecture="wrn-10-1", preprocessing=weights.GREY[0], recipe=recipe), path)


def npz(data: ImageSet, path: Path) -> Path:
    """Write a set as the .npz a user would upload."""
    assert data.labels is not None
    np.savez(path, images=data.images.permute(0, 2, 3, 1).numpy(), labels=data.labels.numpy(), class_names=np.array(data.class_names))
    return path

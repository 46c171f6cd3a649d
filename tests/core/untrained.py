"""Untrained models and images of noise: what a test needs where nothing has to be learnt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from core import architectures, catalog
from core.architectures import Architecture
from core.catalog import Inputs
from core.classifier import Classifier, Preprocessing
from core.images import ImageSet
from core.run import Run


def model(name: str = "wrn-10-1", classes: int = 10) -> Classifier:
    torch.manual_seed(0)
    described = architectures.named(name, classes=classes, channels=3)
    found = Classifier(described.build(), described, Preprocessing((0.5,) * 3, (0.25,) * 3)).eval()
    for layer in found.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
    return found


def run_method(name: str, params: dict[str, Any], inputs: Inputs, seed: int = 0) -> Classifier:
    method = catalog.defenses()[name]
    outcome = method.run(Run(seed=seed, device="cpu"), inputs, method.params(method=name, **params))
    assert isinstance(outcome.model, Classifier)
    return outcome.model


def state(classifier: Classifier) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in classifier.state_dict().items()}


def noise(count: int = 120, classes: int = 4) -> ImageSet:
    """Extreme and random images: any pixel that a trigger can change changes in one of them."""
    make = np.random.default_rng(3)
    pixels = make.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    pixels[::3] = make.integers(0, 2, pixels[::3].shape) * 255
    return ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.arange(count) % classes, tuple("abcd"))


def tiny(classes: int = 3, size: int = 8) -> Classifier:
    torch.manual_seed(0)
    architecture = Architecture("wide_resnet", "wrn-10-1", {"depth": 10, "width": 1, "classes": classes, "channels": 3}, classes, 3, size)
    return Classifier(architecture.build(), architecture, Preprocessing((0.5,) * 3, (0.25,) * 3)).eval()


def some_images(count: int = 8, size: int = 8) -> ImageSet:
    return ImageSet(torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8))

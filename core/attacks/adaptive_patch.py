"""Adaptive patch: optimised so that its features are the target class's, against cleansing by SSL features (SSL-Cleanse, Eqs. 7 and 8)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core.adversarial import optimise_patch
from core.catalog import Need, attack
from core.classifier import Classifier
from core.errors import BadRecipe
from core.images import ImageSet, as_floats
from core.poisoning import AttackParams, Sampling, sampling_field
from core.run import Run
from core.triggers import Assets, Shape, draws, replace


class AdaptivePatch(AttackParams):
    """How large the patch is, and how it is found; the surrogate should be the attacker's own SimCLR encoder."""

    method: Literal["adaptive_patch"]
    sampling: Sampling = sampling_field("S7")
    size: int = Field(default=3, ge=1, le=512, title="Size", description="Side of the patch in the top left corner, pixels: 3, 7 or 11 in the paper.")
    images: int | None = Field(
        default=None, ge=1, le=100_000_000, title="Images", description="How many images of other classes it is optimised on; all when left out."
    )
    epochs: int = Field(default=10, ge=1, le=10_000, title="Epochs")
    learning_rate: float = Field(default=0.05, gt=0, le=10, title="Learning rate", description="Adam's.")
    batch_size: int = Field(default=256, ge=1, le=65_536, title="Batch size")


def assets(params: AdaptivePatch, shape: Shape) -> Assets:
    """Return the mask (C, H, W) bool."""
    _, height, width = shape
    if params.size > min(height, width):
        raise BadRecipe(f"a patch of {params.size} pixels lies outside images of {height}x{width}", "Use a smaller patch.")
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, : params.size, : params.size] = True
    return {"mask": mask}


def fit(run: Run, params: AdaptivePatch, assets: Assets, train: ImageSet, chosen: torch.Tensor, surrogate: Classifier) -> Assets:
    """Return the assets with pattern (C, H, W) uint8: the least mean distance to the target class's mean feature, all of unit length."""
    assert train.labels is not None
    model = surrogate.frozen_copy().to(run.device)
    own, others = (train.labels == params.target).nonzero()[:, 0], (train.labels != params.target).nonzero()[:, 0]
    if not (len(own) and len(others)):
        raise BadRecipe(f"the training set needs images of class {params.target} and of others", "Choose another target.")
    with torch.no_grad():
        mean = sum(F.normalize(model.features(as_floats(train.images[piece].to(run.device))), dim=1).sum(0) for piece in own.split(500)) / len(own)

    def loss(stamped: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (F.normalize(model.features(stamped).float(), dim=1) - mean).norm(dim=1).mean()

    sample = train.subset(others).sample(params.images or len(others), run.generator("adaptive images"))
    mask = assets["mask"]
    start = torch.from_numpy(draws(params.seed, "start").uniform(0.05, 0.95, tuple(mask.shape))).float()
    pattern = optimise_patch(
        run, "adaptive patch", data=sample, mask=mask, start=start, loss=loss, epochs=params.epochs, batch_size=params.batch_size, rate=params.learning_rate
    )
    return {**assets, "pattern": pattern.mul(255).round().to(torch.uint8).cpu() * mask}


@attack(title="Adaptive patch", paper="SSL training-set cleansing, Section 5.5, Eqs. 7 and 8", assets=assets, fit=fit, needs=(Need.MODEL,))
def trigger(images: torch.Tensor, params: AdaptivePatch, assets: Assets) -> torch.Tensor:
    """Replace the patch's pixels."""
    return replace(images, assets["mask"], assets["pattern"])

"""Input-aware dynamic: two networks paint another trigger on every image, and only on its own (Nguyen & Tran, NeurIPS 2020).

The original trains classifier and generators together. Here they are trained together with a copy of the attacker's
surrogate; what comes out poisons a data set before the victim is trained on it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from core import painting, training
from core.catalog import Need, attack
from core.classifier import Classifier
from core.images import ImageSet
from core.poisoning import AttackParams, quantise_field
from core.run import Run
from core.triggers import Assets, Quantise, Shape, quantise


class InputAware(AttackParams):
    """How the generators are trained."""

    method: Literal["input_aware"]
    quantise: Quantise = quantise_field("trunc")
    cross_ratio: float = Field(
        default=1, ge=0, le=9, title="Cross ratio", description="Images with another image's trigger and their own label, for each poisoned one."
    )
    density: float = Field(default=0.032, gt=0, le=1, title="Mask density", description="The share of pixels the mask may cover for free.")
    diversity: float = Field(
        default=1, ge=0, le=100, title="Diversity", description="Weight of the diversity loss, which keeps triggers of different images apart."
    )
    images: int = Field(default=10_000, ge=2, le=100_000_000, title="Images", description="How many training images the generators learn from.")
    mask_epochs: int = Field(default=3, ge=1, le=1000, title="Mask epochs", description="25 in the paper.")
    epochs: int = Field(default=5, ge=1, le=1000, title="Epochs", description="Of generator and surrogate together; 100 in the paper.")
    batch_size: int = Field(default=128, ge=4, le=4096, title="Batch size")


def assets(params: InputAware, shape: Shape) -> Assets:
    """Return a mask of all pixels: any image may be painted anywhere."""
    return {"mask": torch.ones(shape, dtype=torch.bool)}


def _mask(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.tanh(10 * network(images - 0.5)) / 2 + 0.5


def _pattern(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.tanh(network(images - 0.5)) / 2 + 0.5


def _diversity(images: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Return the mean ratio of the distance of two images to that of what was made of them (paper, Eq. 6)."""
    others = made.roll(1, 0)
    apart = (images - images.roll(1, 0)).flatten(1).square().mean(1).sqrt()
    return (apart / ((made - others).float().flatten(1).square().mean(1) + 1e-6).sqrt()).mean()


def fit(run: Run, params: InputAware, assets: Assets, train: ImageSet, chosen: torch.Tensor, surrogate: Classifier) -> Assets:
    """Return the assets with the weights of the mask and pattern networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        channels = train.images.shape[1]
        masks = painting.UNet(channels, 1).to(run.device)
        patterns = painting.UNet(channels, channels).to(run.device)
    sample = train.sample(params.images, run.generator("input-aware images")).to(run.device)

    def mask_loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        made = _mask(masks, images)
        return _diversity(images, made) + 100 * F.relu(made - params.density).mean()

    training.fit(
        run, "mask generator", data=sample, loss=mask_loss, network=masks, optimizer=torch.optim.Adam(masks.parameters(), lr=2e-3, betas=(0.5, 0.9)),
        schedule=training.steps((0, 2e-3)), epochs=params.mask_epochs, batch_size=params.batch_size, prepare=masks.train,
    )  # fmt: skip
    masks.requires_grad_(False)
    model = surrogate.frozen_copy().to(run.device).requires_grad_(True)
    both = nn.ModuleDict({"model": model, "patterns": patterns})

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        tenth = max(len(images) // 10, 1)
        attacked, crossed, clean = images[:tenth], images[tenth : 2 * tenth], images[2 * tenth :]
        own, foreign = _paint(masks, patterns, attacked, attacked), _paint(masks, patterns, crossed, attacked[: len(crossed)])
        logits = model(torch.cat((own, foreign, clean))).float()
        wanted = (labels[:tenth] + 1) % model.classes if params.labels == "all_to_all" else torch.full_like(labels[:tenth], params.target)
        return F.cross_entropy(logits, torch.cat((wanted, labels[tenth:]))) + params.diversity * _diversity(attacked, _pattern(patterns, attacked))

    # One optimizer, so one schedule: both fall from their own rate to zero.
    optimizer = torch.optim.Adam(both.parameters(), lr=1e-3, betas=(0.5, 0.9))
    training.fit(
        run, "pattern generator", data=sample, loss=loss, network=both, optimizer=optimizer, schedule=training.one_cycle(params.epochs, 2e-3),
        epochs=params.epochs, batch_size=params.batch_size, prepare=both.train,
    )  # fmt: skip
    return {**assets, **painting.to_assets(masks, "masks"), **painting.to_assets(patterns, "patterns")}


def _paint(masks: nn.Module, patterns: nn.Module, images: torch.Tensor, makers: torch.Tensor) -> torch.Tensor:
    """Put the triggers made from `makers` on `images`."""
    mask = _mask(masks, makers)
    return images + (_pattern(patterns, makers) - images) * mask


def _stamped(images: torch.Tensor, makers: torch.Tensor, params: InputAware, assets: Assets) -> torch.Tensor:
    channels = images.shape[1]
    masks = painting.from_assets(painting.UNet(channels, 1), assets, "masks").to(images.device)
    patterns = painting.from_assets(painting.UNet(channels, channels), assets, "patterns").to(images.device)
    return quantise(_paint(masks, patterns, images.double() / 255, makers.double() / 255).mul(255), params.quantise)


def disturb(images: torch.Tensor, params: InputAware, assets: Assets, which: torch.Tensor) -> torch.Tensor:
    """Put another image's trigger on."""
    others = images.roll(1, 0) if len(images) > 1 else images.flip(3)
    return _stamped(images, others, params, assets)


@attack(
    title="Input-aware dynamic",
    paper="Nguyen & Tran, Input-Aware Dynamic Backdoor Attack, NeurIPS 2020",
    assets=assets,
    fit=fit,
    disturb=disturb,
    needs=(Need.MODEL,),
)
def trigger(images: torch.Tensor, params: InputAware, assets: Assets) -> torch.Tensor:
    """Put each image's own trigger on."""
    return _stamped(images, images, params, assets)

"""LBA: a patch whose inner features look like the target class's, so that shallow layers carry the backdoor (Yao et al., CCS 2019).

As in Trap-and-Replace's threat model the attacker only poisons data.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from core.adversarial import optimise_patch
from core.catalog import Need, attack
from core.classifier import Classifier
from core.errors import BadRecipe
from core.images import ImageSet, as_floats
from core.poisoning import AttackParams, Sampling, sampling_field
from core.run import Run
from core.triggers import Assets, Shape, draws, replace


class Latent(AttackParams):
    """Which features, and how the patch is found."""

    method: Literal["latent"]
    sampling: Sampling = sampling_field("S6")
    layer: str = Field(
        default="features",
        max_length=200,
        title="Layer",
        description="What must look like the target class: `features`, or a module of the surrogate's network. On WRN-16-1 LBA-14 is `features`, "
        "LBA-12 `block3.layer.0`, LBA-10 `block2`.",
    )
    size: float = Field(default=0.2, gt=0, le=1, title="Size", description="Side of the patch as a share of the image's height.")
    margin: int = Field(default=1, ge=0, le=4096, title="Margin", description="Distance from the bottom right corner, pixels.")
    rounds: int = Field(default=50, ge=1, le=10_000, title="Rounds", description="Of 31 batches of 32 images.")
    learning_rate: float = Field(default=0.1, gt=0, le=10, title="Learning rate", description="Adam's, betas 0.5 and 0.9.")


def assets(params: Latent, shape: Shape) -> Assets:
    """Return the mask (C, H, W) bool."""
    _, height, width = shape
    side, margin = max(round(params.size * height), 1), params.margin
    if side + margin > min(height, width):
        raise BadRecipe(f"a patch of {side} pixels {margin} from the corner lies outside images of {height}x{width}", "Use a smaller patch or margin.")
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, height - margin - side : height - margin, width - margin - side : width - margin] = True
    return {"mask": mask}


def fit(run: Run, params: Latent, assets: Assets, train: ImageSet, chosen: torch.Tensor, surrogate: Classifier) -> Assets:
    """Return the assets with pattern (C, H, W) uint8: the least mean squared distance to features of random target images."""
    assert train.labels is not None
    model = surrogate.frozen_copy().to(run.device)
    inner = _reader(model, params.layer)
    targets = (train.labels == params.target).nonzero()[:, 0]
    if not len(targets):
        raise BadRecipe(f"no training image is of class {params.target}", "Choose a class that has images.")
    sample = train.sample(31 * 32, run.generator("latent images")).to(run.device)

    def loss(stamped: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn = targets[torch.randint(len(targets), (len(stamped),), generator=generator)]
        with torch.no_grad():
            wanted = inner(as_floats(train.images[drawn].to(run.device)))
        return (inner(stamped) - wanted).float().square().mean()

    mask = assets["mask"]
    start = torch.from_numpy(draws(params.seed, "start").uniform(0.05, 0.95, tuple(mask.shape))).float()
    pattern = optimise_patch(
        run, "latent", data=sample, mask=mask, start=start, loss=loss, epochs=params.rounds, batch_size=32, rate=params.learning_rate, betas=(0.5, 0.9)
    )
    return {**assets, "pattern": pattern.mul(255).round().to(torch.uint8).cpu() * mask}


def _reader(model: Classifier, layer: str):  # type: ignore[no-untyped-def]
    """Return a function from images to the layer's output."""
    if layer == "features":
        return model.features
    try:
        module = model.network.get_submodule(layer)
    except AttributeError as error:
        raise BadRecipe(f"the surrogate {model.architecture.name} has no module {layer!r}", "Name one of its modules, or `features`.") from error
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        kept[:] = [output]

    module.register_forward_hook(keep)

    def read(images: torch.Tensor) -> torch.Tensor:
        model(images)
        return kept[0]

    return read


@attack(title="Latent backdoor", paper="Yao et al., Latent Backdoor Attacks on Deep Neural Networks, CCS 2019", assets=assets, fit=fit, needs=(Need.MODEL,))
def trigger(images: torch.Tensor, params: Latent, assets: Assets) -> torch.Tensor:
    """Replace the patch's pixels."""
    return replace(images, assets["mask"], assets["pattern"])

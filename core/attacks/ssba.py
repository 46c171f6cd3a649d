"""SSBA: a network hides a code in each image, so that every image has its own trigger (Li et al., ICCV 2021).

The published encoder cannot be shipped; one of the same kind (StegaStamp: code and image in, image out, with a decoder that
must read the code back) is trained on the training images, and one code is drawn.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from core import painting, training
from core.catalog import attack
from core.classifier import Classifier
from core.images import ImageSet
from core.poisoning import AttackParams, Sampling, sampling_field
from core.run import Run
from core.triggers import Assets, Shape, draws

BITS = 100


class Ssba(AttackParams):
    """How the encoder is trained."""

    method: Literal["ssba"]
    sampling: Sampling = sampling_field("S2")
    psnr: float = Field(default=29, ge=20, le=45, title="PSNR", description="How near the images must stay, dB; the published pairs have 26 to 30.")
    reach: float = Field(default=0.25, gt=0, le=1, title="Reach", description="The most a pixel may change, of 1.")
    images: int = Field(default=10_000, ge=1, le=100_000_000, title="Images", description="How many training images the encoder learns from.")
    epochs: int = Field(default=8, ge=1, le=1000, title="Epochs")
    learning_rate: float = Field(default=2e-3, gt=0, le=1, title="Learning rate", description="Adam's.")
    batch_size: int = Field(default=64, ge=1, le=4096, title="Batch size")


class Encoder(nn.Module):
    """Hides a code (N, 100) in images (N, C, H, W) in [0, 1]."""

    def __init__(self, channels: int, reach: float) -> None:
        super().__init__()
        self.spread = nn.Linear(BITS, 4 * 8 * 8)
        self.paint = painting.UNet(channels + 4, channels)
        self.reach = reach

    def forward(self, images: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Return the images with the code."""
        planes = F.interpolate(self.spread(code - 0.5).reshape(-1, 4, 8, 8), size=images.shape[2:])
        return (images + self.reach * torch.tanh(self.paint(torch.cat((images - 0.5, planes), dim=1)))).clamp(0, 1)


class Decoder(nn.Module):
    """Reads the code back: (N, C, H, W) to logits (N, 100)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.look = nn.Sequential(painting.block(channels, 32), painting.block(32, 32, 2), painting.block(32, 64, 2), nn.AdaptiveAvgPool2d(8))
        self.read = nn.Linear(64 * 8 * 8, BITS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return one logit a bit."""
        return self.read(self.look(images - 0.5).flatten(1))


def assets(params: Ssba, shape: Shape) -> Assets:
    """Return the secret code (100,) uint8 and a mask of all pixels."""
    return {"code": torch.from_numpy(draws(params.seed, "code").integers(0, 2, BITS)).to(torch.uint8), "mask": torch.ones(shape, dtype=torch.bool)}


def fit(run: Run, params: Ssba, assets: Assets, train: ImageSet, chosen: torch.Tensor, surrogate: Classifier | None) -> Assets:
    """Return the assets with the trained encoder's weights.

    The loss is the bits' cross-entropy plus the squared error in excess of what `psnr` allows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        channels = train.images.shape[1]
        both = nn.ModuleDict({"encoder": Encoder(channels, params.reach), "decoder": Decoder(channels)}).to(run.device)
    codes = run.generator("ssba codes")
    allowed = 10 ** (-params.psnr / 10)
    kept: dict[str, float] = {}

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        code = torch.randint(0, 2, (len(images), BITS), generator=codes).to(images)
        painted = both["encoder"](images, code)
        read = both["decoder"](painted).float()
        error = (painted.float() - images).square().mean()
        kept["bit_accuracy"] = float(((read > 0) == (code > 0.5)).float().mean())
        kept["psnr"] = float(-10 * error.detach().log10())
        return F.binary_cross_entropy_with_logits(read, code) + F.relu(error / allowed - 1)

    sample = train.sample(params.images, run.generator("ssba images")).to(run.device)
    training.fit(
        run, "ssba", data=sample, loss=loss, network=both, optimizer=torch.optim.Adam(both.parameters(), lr=params.learning_rate),
        schedule=training.one_cycle(params.epochs, params.learning_rate), epochs=params.epochs, batch_size=params.batch_size, prepare=both.train,
        state={"codes": codes},
    )  # fmt: skip
    run.log("trained the encoder", **kept)
    if kept and kept["bit_accuracy"] < 0.95:
        run.warn(f"the decoder reads only {kept['bit_accuracy']:.1%} of the bits; more epochs make a surer trigger")
    return {**assets, **painting.to_assets(both["encoder"], "encoder")}


@attack(title="SSBA", paper="Li et al., Invisible Backdoor Attack with Sample-Specific Triggers, ICCV 2021", assets=assets, fit=fit)
def trigger(images: torch.Tensor, params: Ssba, assets: Assets) -> torch.Tensor:
    """Hide the secret code in each image."""
    encoder = painting.from_assets(Encoder(images.shape[1], params.reach), assets, "encoder").to(images.device)
    code = assets["code"].to(images.device).double().expand(len(images), -1)
    return encoder(images.double() / 255, code).mul(255).to(torch.uint8)

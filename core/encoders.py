"""Encoders: a backbone with a projection, trained contrastively on images whose labels nobody trusts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from core import training, victim
from core.activations import collect
from core.augment import Mirroring, simclr
from core.classifier import Classifier, Preprocessing
from core.images import ImageSet
from core.losses import supervised_contrastive
from core.run import Run

# Of the linear classifiers.
MOMENTUM = 0.9
# Says which images of a batch are alike: (n,) indices into the set → (n, n) bool.
Alike = Callable[[torch.Tensor], torch.Tensor]


class Encoding(Mirroring):
    """How an encoder is trained; the defaults are SupContrast's for CIFAR-10."""

    architecture: str = Field(default="resnet18-cifar", max_length=64, title="Architecture", description="Of the backbone, by its name in the catalogue.")
    projector: Literal["linear", "mlp"] = Field(default="linear", title="Projector", description="`mlp` has a hidden layer as wide as the features.")
    dimension: int = Field(default=128, ge=2, le=4096, title="Dimension", description="Of the embedding.")
    encoder_epochs: int = Field(default=1000, ge=1, le=10_000, title="Epochs of the encoder")
    encoder_batch: int = Field(default=512, ge=2, le=8192, title="Batch size of the encoder", description="Images; each is seen in two views.")
    encoder_rate: float = Field(default=0.5, gt=0, le=10, title="Learning rate of the encoder", description="Reached by a linear rise, left by a cosine.")


class Heading(Mirroring):
    """How a linear classifier on a frozen encoder is trained."""

    bound_rate: bool = Field(
        default=True,
        title="Bound the classifier's rate",
        description="Where the features are so long that the published rate, 5, makes the linear classifier diverge, take the highest one at which it is stable; off as published.",
    )


class Encoder(nn.Module):
    """A classifier's backbone and a projection of its features."""

    def __init__(self, backbone: Classifier, projector: str, dimension: int) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.head.in_features
        hidden = [nn.Linear(width, width), nn.ReLU(inplace=True)] if projector == "mlp" else []
        self.projection = nn.Sequential(*hidden, nn.Linear(width, dimension))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings (N, dimension), not normalised, of float images in [0, 1]."""
        return self.projection(self.backbone.features(images))


def untrained(run: Run, name: str, data: ImageSet, params: Encoding, preprocessing: Preprocessing) -> Encoder:
    """Return a new encoder on the run's device; seed and name decide its first weights.

    Raises `ArchitectureUnknown`.
    """
    backbone = victim.untrained(run, name, params.architecture, data, preprocessing)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=run.generator(name, "projection"))))
        return Encoder(backbone, params.projector, params.dimension).to(run.device)


def contrast(
    run: Run,
    name: str,
    encoder: Encoder,
    data: ImageSet,
    params: Encoding,
    *,
    temperature: float,
    base_temperature: float | None = None,
    alike: Alike | None = None,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[float]:
    """Train an encoder on two augmented views of every image, in place, as a resumable stage; return each epoch's mean loss.

    SimCLR (SSL-Cleanse, Eq. 5) unless `alike` says which images are each other's positives besides an image's own two views.
    SGD (momentum 0.9, weight decay 1e-4).
    """
    views = run.generator(name, "views")
    view = simclr(mirror=params.mirror)

    def loss(images: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        first, second = encoder(torch.cat([view(images, views), view(images, views)])).chunk(2)
        positives = torch.eye(len(images), dtype=torch.bool, device=images.device) if alike is None else alike(which)
        return supervised_contrastive(first, second, positives, temperature=temperature, base_temperature=base_temperature)

    history = training.fit(
        run, name, data=numbered(data), loss=training.supervised(loss), network=encoder,
        optimizer=torch.optim.SGD(encoder.parameters(), lr=params.encoder_rate, momentum=0.9, weight_decay=1e-4),
        schedule=training.warmed_cosine(params.encoder_epochs, params.encoder_rate), epochs=params.encoder_epochs,
        batch_size=min(params.encoder_batch, len(data)), prepare=encoder.train, after_epoch=after_epoch, state={"views": views},
    )  # fmt: skip
    encoder.eval()
    return history


def train_head(
    run: Run,
    name: str,
    model: Classifier,
    data: ImageSet,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    epochs: int,
    schedule: training.Schedule,
    batch_size: int,
    how: Heading,
    over: ImageSet | None = None,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[float]:
    """Train a new last layer on a frozen backbone, in place, on one SimCLR view of each image; return each epoch's mean loss.

    SGD (momentum 0.9, no weight decay); the backbone stays in eval mode. As published for D-ST's second stage and for SupContrast's classifier,
    but for a rate that is not stable (`bound_rate`): then the whole schedule is lowered.

    Args:
        loss: of logits (n, classes) and the images' indices in `data` (n,); curved nowhere more than a mean cross-entropy.
        over: the images that it is a mean over; all of `data` if left out.

    Raises `OutputsNotFinite`.
    """
    views = run.generator(name, "views")
    view = simclr(mirror=how.mirror)
    lowered = 1.0
    if how.bound_rate and (highest := run.once(f"{name} rate", lambda: highest_rate(run, model.eval(), data if over is None else over))) < schedule(0):
        run.log(f"the linear classifier's rate is {highest:.3g}, not {schedule(0):g}, with which features as long as these make it diverge")
        lowered = highest / schedule(0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=run.generator(name, "weights"))))
        model.head.reset_parameters()
    model.requires_grad_(False).eval()
    model.head.requires_grad_(True)

    def indexed(images: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = model.features(view(images, views))
        return loss(model.head(features).float(), which)

    history = training.fit(
        run, name, data=numbered(data), loss=training.supervised(indexed), network=model,
        optimizer=torch.optim.SGD(model.head.parameters(), lr=schedule(0), momentum=MOMENTUM),
        schedule=lambda epoch: lowered * schedule(epoch), epochs=epochs,
        batch_size=min(batch_size, len(data)), prepare=model.eval, after_epoch=after_epoch, state={"views": views},
    )  # fmt: skip
    model.requires_grad_(True)
    return history


def highest_rate(run: Run, model: Classifier, data: ImageSet) -> float:
    """Return the highest rate at which gradient descent with momentum on a linear classifier of a backbone's features is stable.

    That is 2 (1 + momentum) / L for a quadratic that is nowhere curved by more than L (Polyak, 1964). Cross-entropy of a softmax is not by more
    than half of the largest eigenvalue of the features' second moments, the bias a feature that is 1 (Böhning, 1992).

    Raises `OutputsNotFinite`.
    """
    features = F.pad(collect(run, model.features, data), (0, 1), value=1.0).double()
    return 4 * (1 + MOMENTUM) / float(torch.linalg.eigvalsh(features.T @ features / len(features))[-1])


def numbered(data: ImageSet) -> ImageSet:
    """Return the images with their own indices for labels: a loss is told which images it sees, and looks up what it may know of them."""
    return replace(data, labels=torch.arange(len(data), device=data.images.device), class_names=(), names=())


def embed(run: Run, function: Callable[[torch.Tensor], torch.Tensor], data: ImageSet) -> torch.Tensor:
    """Return what an encoder (in eval mode) makes of every image, scaled to length 1: (N, d) float32 on the run's device, without augmentation."""
    return F.normalize(collect(run, function, data), dim=1, eps=1e-8)

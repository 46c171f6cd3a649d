"""MESA: a generator models the distribution of a backdoor's triggers (Qiao et al., NeurIPS 2019); their size and place are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from core.classifier import Classifier
from core.errors import BadDataset
from core.images import ImageSet, as_floats
from core.run import Run
from core.training import batches

NOISE, CHUNKS = 64, 4


@dataclass(frozen=True)
class Place:
    """A square of `size` pixels, so many pixels from the right and the lower edge."""

    size: int
    right: int
    bottom: int

    def cut(self, height: int, width: int) -> tuple[slice, slice]:
        """Return its rows and columns; raises `BadDataset` when it does not lie inside the image."""
        top, left = height - self.bottom - self.size, width - self.right - self.size
        if top < 0 or left < 0:
            raise BadDataset(
                f"a patch of {self.size} pixels, {self.right} from the right and {self.bottom} from below, lies outside of {height}x{width}",
                "Give a smaller `size`, `right` or `bottom`.",
            )
        return slice(top, top + self.size), slice(left, left + self.size)


class Generator(nn.Module):
    """Noise (N, 64) to patches (N, C, size, size) in [0, 1]; a quarter of the noise enters at each layer."""

    def __init__(self, channels: int, place: Place, hidden: int) -> None:
        super().__init__()
        part = NOISE // CHUNKS
        self.place, self.channels = place, channels
        self.layers = nn.ModuleList([nn.Linear(part, hidden), nn.Linear(hidden + part, hidden), nn.Linear(hidden + part, hidden)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(hidden) for _ in range(3)])
        self.last = nn.Linear(hidden + part, channels * place.size**2)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the patches of this noise."""
        parts = noise.chunk(CHUNKS, 1)
        x = parts[0]
        for layer, norm, following in zip(self.layers, self.norms, parts[1:], strict=True):
            x = torch.cat([F.leaky_relu(norm(layer(x)), 0.2), following], 1)
        return torch.sigmoid(self.last(x)).unflatten(1, (self.channels, self.place.size, self.place.size))

    def put(self, images: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return images (N, C, H, W) with these patches at the known place."""
        rows, columns = self.place.cut(*images.shape[2:])
        stamped = images.clone()
        stamped[:, :, rows, columns] = patches
        return stamped

    def stamp(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the images with a new draw on each."""
        with torch.no_grad():
            return self.put(images, self(torch.rand(len(images), NOISE, generator=generator).to(images.device)))

    def picture(self, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mask (H, W) and the mean pattern (C, H, W) for images of (C, H, W)."""
        device = next(self.parameters()).device
        rows, columns = self.place.cut(*shape[1:])
        mask, pattern = torch.zeros(shape[1:], device=device), torch.zeros(shape, device=device)
        with torch.no_grad():
            mask[rows, columns] = 1
            pattern[:, rows, columns] = self(torch.rand(256, NOISE, generator=generator).to(device)).mean(0)
        return mask, pattern


class Critic(nn.Module):
    """MINE's statistics network T(noise, patch)."""

    def __init__(self, patch: int, hidden: int) -> None:
        super().__init__()
        self.noise = nn.Linear(NOISE, hidden, bias=False)
        self.patch = nn.Linear(patch, hidden)
        self.rest = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1), nn.LeakyReLU(0.2))

    def forward(self, noise: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return T of each pair, (N,)."""
        value: torch.Tensor = self.rest(self.noise(noise) + self.patch(patches.flatten(1))).squeeze(1)
        return value


def information(joint: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """Return MINE's lower bound of the mutual information: mean T(joint) - log mean exp T(apart), from (N,) each."""
    return joint.mean() - (torch.logsumexp(apart, 0) - math.log(len(apart)))


def model_triggers(
    run: Run,
    classifier: Classifier,
    clean: ImageSet,
    target: int,
    place: Place,
    *,
    alpha: float = 0.1,
    beta: float = 0.8,
    epochs: int = 10,
    batch_size: int = 128,
    hidden: int = 512,
) -> tuple[Generator, float]:
    """Train the generator as a resumable stage; return it in eval mode with its triggers' success rate on the clean images.

    Args:
        alpha: weight of the entropy term. beta: the confidence above which a trigger is good enough.

    Raises `BadDataset` when the place lies outside of the images.
    """
    frozen = classifier.frozen_copy()
    place.cut(*clean.images.shape[2:])
    channels = clean.images.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        maker = Generator(channels, place, hidden).to(run.device)
        critic = Critic(channels * place.size**2, hidden).to(run.device)
    optimizers = {part: torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part, network in (("maker", maker), ("critic", critic))}
    generator = run.generator("model triggers")
    # The moving average of mean exp T(apart) takes the bias out of MINE's gradient.
    average = torch.ones((), device=run.device)
    state = {"maker": maker, "critic": critic, "maker_optimizer": optimizers["maker"], "critic_optimizer": optimizers["critic"], "average": average}

    def noise(count: int) -> torch.Tensor:
        return torch.rand(count, NOISE, generator=generator).to(run.device)

    for _ in run.stage("model triggers", total=epochs, generator=generator, **state):
        maker.train()
        for chosen in batches(len(clean), batch_size, generator, drop_last=True):
            images = as_floats(clean.images[chosen.to(run.device)])
            drawn = noise(len(images))
            patches = maker(drawn)
            jitter = torch.randn(patches.shape, generator=generator).to(run.device) * 0.1
            reached = frozen(maker.put(images, patches + jitter)).float().softmax(1)[:, target]
            gain = reached.clamp(max=beta).mean() + alpha * information(critic(drawn, patches), critic(noise(len(images)), patches))
            _descend(optimizers["maker"], -gain)
            drawn = noise(len(images))
            with torch.no_grad():
                patches = maker(drawn)
            joint, apart = critic(drawn, patches), critic(noise(len(images)), patches)
            exponent = apart.exp().mean()
            average.lerp_(exponent.detach(), 0.001)
            _descend(optimizers["critic"], -(joint.mean() - exponent / average))
    maker.eval()
    stamped = maker.stamp(as_floats(clean.images), generator)
    with torch.no_grad():
        hits = sum(int((frozen(chunk).argmax(1) == target).sum()) for chunk in stamped.split(500))
    return maker, hits / len(clean)


def _descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()

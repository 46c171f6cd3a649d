"""Maximum margins: how far a class's logit can be lifted above the others, over all possible images (MM-BD)."""

from __future__ import annotations

import math

import torch

from core.classifier import Classifier
from core.images import at_once
from core.run import Run
from core.training import mixed_precision


def largest_margins(
    run: Run, name: str, classifier: Classifier, shape: tuple[int, int, int], *, starts: int = 10, steps: int = 150, rate: float = 0.1, batch_size: int = 200
) -> list[float]:
    """Return for every class the largest margin `f_c - max f_k` found over images in [0, 1], as a resumable stage (MM-BD, Eq. 1).

    Signed gradient ascent with momentum from random images; the steps shrink linearly to zero.

    Args:
        shape: (C, H, W). starts: random images a class. rate: the first step's length in [0, 1].
    """
    frozen = classifier.frozen_copy()
    generator = run.generator(name)
    count = frozen.classes * starts
    labels = torch.arange(frozen.classes).repeat_interleave(starts).to(run.device)
    images = torch.rand(count, *shape, generator=generator).to(run.device).contiguous(memory_format=torch.channels_last)
    velocity = torch.zeros_like(images)
    best = torch.full((count,), float("-inf"), device=run.device)
    for step in run.stage(name, total=steps, images=images, velocity=velocity, best=best):
        for rows in torch.arange(count, device=run.device).split(at_once(math.prod(shape), batch_size)):
            here = images[rows].requires_grad_(True)
            with mixed_precision(run.device):
                logits = frozen(here).float()
            margin = margins(logits, labels[rows])
            (slope,) = torch.autograd.grad(margin.sum(), here)
            best[rows] = torch.maximum(best[rows], margin.detach())
            # Gradients of different images differ by orders of magnitude.
            velocity[rows] = 0.9 * velocity[rows] + slope / slope.abs().flatten(1).mean(1).clamp(min=1e-12)[:, None, None, None]
            images[rows] = (images[rows] + rate * (1 - step / steps) * velocity[rows].sign()).clamp(0, 1)
    return [float(value) for value in best.view(frozen.classes, starts).max(1).values]


def margins(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each row's logit of its label minus the largest other one, (N,) from (N, classes)."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], float("-inf")).max(1).values

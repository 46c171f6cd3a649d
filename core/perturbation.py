"""Universal perturbations: the smallest change that, added to every image, sends it to a class (PT-RED)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.classifier import Classifier
from core.images import ImageSet, as_floats, at_once
from core.run import Run
from core.training import mixed_precision

# Enough to tell the wanted share from less.
IMAGES = 500


@dataclass(frozen=True)
class Perturbations:
    """What leads to each of L classes.

    Attributes:
        images: (L, C, H, W), to be added to images in [0, 1], which are clipped.
        success: share of the other classes' images that each one sends to its class; below the wanted share where the steps did not suffice.
    """

    images: torch.Tensor
    success: list[float]

    @property
    def norms(self) -> list[float]:
        """Their Euclidean lengths."""
        return [float(length) for length in self.images.double().flatten(1).norm(dim=1)]


def smallest_perturbations(
    run: Run, name: str, classifier: Classifier, clean: ImageSet, *, success: float = 0.95, step: float = 0.003, steps: int = 400, batch_size: int = 32
) -> Perturbations:
    """Grow a perturbation for every class from nothing until it leads there, as a resumable stage (PT-RED, from all other classes at once).

    Gradient steps of one length on batches of clean images, which all classes share; a class ends when `success` of the images that the model does
    not take for it anyway follow. Their own labels are not used.

    Args:
        clean: images on the run's device; at most 500 of them, drawn at random.
        step: a step's root mean square a pixel, of values in [0, 1].
    """
    frozen = classifier.frozen_copy()
    generator = run.generator(name)
    chosen = torch.randperm(len(clean), generator=generator)[:IMAGES].to(run.device)
    images = as_floats(clean.images[chosen]).contiguous(memory_format=torch.channels_last)
    count, shape = frozen.classes, images.shape[1:]

    def predicted(perturbed: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), mixed_precision(run.device):
            return frozen(perturbed.clamp(0, 1)).argmax(1)

    anyway = predicted(images)
    found = torch.zeros(count, *shape, device=run.device)
    reached = torch.zeros(count, dtype=torch.float64, device=run.device)
    active = torch.ones(count, dtype=torch.bool, device=run.device)
    length = step * math.sqrt(math.prod(shape))
    stage = run.stage(name, total=steps, generator=generator, found=found, reached=reached, active=active)
    for _ in stage:
        batch = images[torch.randperm(len(images), generator=generator)[:batch_size].to(run.device)]
        for rows in active.nonzero().squeeze(1).split(at_once(batch.numel(), count)):
            here = found[rows].requires_grad_(True)
            wanted = rows.repeat_interleave(len(batch))
            with mixed_precision(run.device):
                logits = frozen(_all_on_each(batch, here).clamp(0, 1)).float()
            errors = F.cross_entropy(logits, wanted, reduction="none").view(len(rows), -1).mean(1)
            (slope,) = torch.autograd.grad(errors.sum(), here)
            found[rows] -= length * slope / slope.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
            hits = (logits.argmax(1) == wanted).view(len(rows), -1).float().mean(1)
            for row in rows[hits >= success]:
                others = images[anyway != row]
                reached[row] = int((predicted(others + found[row]) == row).sum()) / max(len(others), 1)
                active[row] = bool(reached[row] < success)
        run.metric(f"{name} success", float(reached.mean()), active=int(active.sum()))
        if not active.any():
            stage.stop()
    return Perturbations(found, reached.tolist())


def _all_on_each(images: torch.Tensor, perturbations: torch.Tensor) -> torch.Tensor:
    """Return L perturbations added to N images: (L * N, C, H, W), label-major, channels-last in memory."""
    pixels = images.permute(0, 2, 3, 1)[None] + perturbations.permute(0, 2, 3, 1)[:, None]
    return pixels.flatten(0, 1).permute(0, 3, 1, 2)

"""Optimised perturbations: PGD on images, and one patch for all images. Pixels are in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from core.classifier import Classifier
from core.images import ImageSet, as_floats
from core.run import Run
from core.training import batches, mixed_precision


def pgd(
    classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, *, epsilon: float, step: float, steps: int, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Return images (N, C, H, W) in [0, 1] moved within `epsilon` (L-infinity) to raise the cross-entropy of `labels` (Madry et al., 2018).

    Args:
        classifier: in eval mode, without parameter gradients.
        epsilon, step: in [0, 1] units; each of the `steps` ends inside [x - epsilon, x + epsilon] and [0, 1].
        start: added first, (N, C, H, W) in [-epsilon, epsilon]; none starts at the images.
    """

    def loss(moved: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(classifier(moved).float(), labels, reduction="sum")

    return ascend(images, loss, epsilon=epsilon, step=step, steps=steps, start=start)


def ascend(
    images: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    *,
    epsilon: float,
    step: float,
    steps: int,
    start: torch.Tensor | None = None,
    norm: Literal["linf", "l2"] = "linf",
) -> torch.Tensor:
    """Return images (N, C, H, W) in [0, 1] moved within `epsilon` by gradient ascent on `loss(images)`: its sign, or for `l2` its direction. See `pgd`."""
    low, high = (images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1)
    moved = images if start is None else (images + start).clamp(0, 1)
    for _ in range(steps):
        moved = moved.detach().requires_grad_(True)
        with mixed_precision(images.device):
            value = loss(moved)
        (slope,) = torch.autograd.grad(value, moved)
        if norm == "linf":
            moved = torch.minimum(torch.maximum(moved.detach() + step * slope.sign(), low), high)
        else:
            moved = (images + within(moved.detach() + step * slope / lengths(slope) - images, epsilon)).clamp(0, 1)
    return moved.detach()


def within(delta: torch.Tensor, length: float) -> torch.Tensor:
    """Return changes (N, C, H, W), each shortened to an L2 norm of at most `length`."""
    return delta * (length / lengths(delta)).clamp(max=1)


def lengths(delta: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each change (N, C, H, W), at least 1e-12, as (N, 1, 1, 1)."""
    return delta.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]


def optimise_patch(
    run: Run,
    name: str,
    *,
    data: ImageSet,
    mask: torch.Tensor,
    start: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    epochs: int,
    batch_size: int,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.Tensor:
    """Return the pattern (C, H, W) in [0, 1] that minimises `loss(stamped images, generator)` where `mask` (C, H, W) shows it.

    Optimised with Adam through a sigmoid, from `start` (C, H, W) in (0, 1), as a resumable stage.
    """
    free = torch.logit(start.to(run.device), eps=1e-3).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=rate, betas=betas)
    generator = run.generator(name)
    shown = mask.to(run.device)
    for epoch in run.stage(name, total=epochs, pattern=free, optimizer=optimizer, generator=generator):
        total = 0.0
        for chosen in batches(len(data), batch_size, generator, drop_last=True):
            images = as_floats(data.images[chosen].to(run.device))
            with mixed_precision(run.device):
                value = loss(torch.where(shown, torch.sigmoid(free), images), generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total = float(value.detach())
        run.metric(f"{name} loss", total, epoch=epoch + 1)
    return torch.sigmoid(free).detach()

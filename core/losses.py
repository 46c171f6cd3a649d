"""Losses, each with the equation it implements."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def model_contrastive(student: torch.Tensor, clean: torch.Tensor, poisoned: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Return the batch mean of MCLDef's model-contrastive loss (Eqs. 3 and 4).

    Every anchor has one positive, the teacher's feature of the clean image, and one negative, the teacher's feature
    of the triggered image: `softplus((sim(z, z_poi) - sim(z, z_cle)) / tau)` with cosine similarities, the closed
    form of the two-way cross-entropy.

    Args:
        student: features of the triggered images, (N, features).
        clean, poisoned: the teacher's features, without gradient, (N, features).
        temperature: tau > 0.
    """
    anchor = F.normalize(student.float(), dim=1, eps=1e-8)
    positive = (anchor * F.normalize(clean.float(), dim=1, eps=1e-8)).sum(1)
    negative = (anchor * F.normalize(poisoned.float(), dim=1, eps=1e-8)).sum(1)
    return F.softplus((negative - positive) / temperature).mean()


def info_nce(anchors: torch.Tensor, others: torch.Tensor, *, temperature: float, symmetric: bool = False) -> torch.Tensor:
    """Return the batch mean of the contrastive loss (SimCLR; CBD Eq. 7): row i of `others` is the positive of row i of `anchors`.

    The denominator runs over the other anchors and all of `others`, 2N - 1 terms with the positive among them; cosine
    similarities over tau.

    Args:
        anchors, others: (N, features), N >= 1.
        symmetric: average with the loss whose anchors are `others`, which is SimCLR's over all 2N views.
    """
    a, b = F.normalize(anchors.float(), dim=1, eps=1e-8), F.normalize(others.float(), dim=1, eps=1e-8)
    across = a @ b.T / temperature

    def one_way(within: torch.Tensor, between: torch.Tensor) -> torch.Tensor:
        own = torch.eye(len(a), dtype=torch.bool, device=a.device)
        return F.cross_entropy(torch.cat([between, (within / temperature).masked_fill(own, float("-inf"))], 1), torch.arange(len(a), device=a.device))

    loss = one_way(a @ a.T, across)
    return (loss + one_way(b @ b.T, across.T)) / 2 if symmetric else loss

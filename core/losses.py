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

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
    across = _products(a, b) / temperature

    def one_way(within: torch.Tensor, between: torch.Tensor) -> torch.Tensor:
        own = torch.eye(len(a), dtype=torch.bool, device=a.device)
        return F.cross_entropy(torch.cat([between, (within / temperature).masked_fill(own, float("-inf"))], 1), torch.arange(len(a), device=a.device))

    loss = one_way(_products(a, a), across)
    return (loss + one_way(_products(b, b), across.T)) / 2 if symmetric else loss


def _products(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return all dot products in full precision, under autocast too: divided by a small temperature, bf16's errors are as large as the differences."""
    with torch.autocast(first.device.type, enabled=False):
        return first @ second.T


def supervised_contrastive(
    first: torch.Tensor, second: torch.Tensor, alike: torch.Tensor, *, temperature: float, base_temperature: float | None = None
) -> torch.Tensor:
    """Return the mean over all 2N views of the supervised contrastive loss (Khosla et al., Eq. 2), `T / T_base` times.

    `-1 / |P(a)| * sum_{p in P(a)} (f_a f_p / T - log sum_{b != a} exp(f_a f_b / T))`, where P(a) are the other views of the images that
    `alike` calls positives of a's image. With the identity it is SimCLR's loss (SSL-Cleanse, Eq. 5); with the flags of FCT's split it is SS-CTL.

    Args:
        first, second: two views' embeddings, (N, features); they are normalised here.
        alike: (N, N) bool, row i: the images whose views are positives of image i's. The diagonal must be set.
        temperature: T. base_temperature: T_base, T itself unless given.
    """
    views = F.normalize(torch.cat([first, second]).float(), dim=1, eps=1e-8)
    own = torch.eye(len(views), dtype=torch.bool, device=views.device)
    logits = (_products(views, views) / temperature).masked_fill(own, float("-inf"))
    chances = logits - logits.logsumexp(1, keepdim=True)
    positive = alike.repeat(2, 2) & ~own
    loss = -(chances.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
    return loss * (temperature / base_temperature if base_temperature else 1.0)


def alike_where_clean(labels: torch.Tensor, clean: torch.Tensor, *, symmetric: bool = True) -> torch.Tensor:
    """Return SS-CTL's positives (FCT, Eqs. 9 to 11), (N, N) bool: each image itself, and for clean images all clean ones of the same label.

    Args:
        labels: (N,) int64. clean: (N,) bool.
        symmetric: False lets clean images attract any image of their label, as the published code does.
    """
    same = (labels[:, None] == labels[None]) & clean[:, None]
    if symmetric:
        same = same & clean[None]
    return same | torch.eye(len(labels), dtype=torch.bool, device=labels.device)


def intra_class(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine between the centres of different classes in a batch (FCT, Algorithm 1): `1 / C'^2 * sum_{i != j} cos(c_i, c_j)`.

    Args:
        features: (N, features). labels: (N,) int64; classes without an image here play no part, a zero centre is like no other.
    """
    features = features.float()
    present, which = labels.unique(return_inverse=True)
    sums = torch.zeros(len(present), features.shape[1], device=features.device).index_add(0, which, features)
    centres = F.normalize(sums / which.bincount()[:, None], dim=1, eps=1e-8)
    cosines = _products(centres, centres)
    return (cosines.sum() - cosines.diagonal().sum()) / len(present) ** 2


def mixed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, poisoned: torch.Tensor, *, weight: float) -> torch.Tensor:
    """Return the mean cross-entropy of the clean images minus `weight` times that of the poisoned ones (D-ST, Eq. 3).

    Args:
        logits: (N, classes). labels: (N,) int64. poisoned: (N,) bool; a part without images counts as zero.
    """
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    mean = [each[part].sum() / part.sum().clamp(min=1) for part in (~poisoned, poisoned)]
    return mean[0] - weight * mean[1]


def gradient_ascent_trap(logits: torch.Tensor, labels: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Return the mean of `sign(CE - gamma) * CE` over images: what falls below gamma is pushed up again (ABL's local gradient ascent)."""
    each = F.cross_entropy(logits.float(), labels, reduction="none")
    return (torch.sign(each.detach() - gamma) * each).mean()


def unlikelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each image's `-log(1 - p)` of its label, (N,) (unlikelihood training, Welleck et al., ICLR 2020): at least 0, steepest where p is 1.

    Args:
        logits: (N, classes), two classes or more. labels: (N,) int64.
    """
    logits = logits.float()
    # 1 - p would round to zero where it matters most.
    others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), float("-inf"))
    return logits.logsumexp(1) - others.logsumexp(1)


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Return the squared differences of neighbouring pixels, summed and divided by the number of values (Trap-and-Replace, stage 1)."""
    down = (images[:, :, 1:] - images[:, :, :-1]).square().sum()
    right = (images[..., 1:] - images[..., :-1]).square().sum()
    return (down + right) / images.numel()


def symmetric_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, forward: float = 0.1, reverse: float = 1.0) -> torch.Tensor:
    """Return each image's symmetric cross-entropy `forward * CE + reverse * RCE`, (N,) (Wang et al., ICCV 2019; DBD).

    Probabilities are at least 1e-7, the one-hot labels at least 1e-4.
    """
    logits = logits.float()
    chances = logits.softmax(1).clamp(1e-7, 1)
    wanted = F.one_hot(labels, logits.shape[1]).float().clamp(1e-4, 1)
    return forward * F.cross_entropy(logits, labels, reduction="none") - reverse * (chances * wanted.log()).sum(1)

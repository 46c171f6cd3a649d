"""Exact votes of the nearest neighbours and energies of all images, for 50,000 embeddings and more, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.run import Run


@dataclass(frozen=True)
class Neighbourhood:
    """What an embedding and the given labels say of every image.

    Attributes:
        votes: (N, C) int64, how many of the k nearest other images carry each label.
        similarities: (N, C) float32, the sum of their similarities; decides ties of votes.
        energies: (N, C) float32, `S_c(i)` of SSL-Cleanse, Eq. 6; minus infinity where no other image carries the label.
    """

    votes: torch.Tensor
    similarities: torch.Tensor
    energies: torch.Tensor

    def elected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the class with most votes (N,), ties broken by summed similarity and then by the smaller index, and its share of the votes."""
        most = self.votes.max(1, keepdim=True).values
        tied = self.similarities.masked_fill(self.votes < most, float("-inf"))
        return tied.argmax(1), most[:, 0] / self.votes.sum(1)

    def attracted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the class with the largest energy (N,), and that energy: negative, larger is surer."""
        best = self.energies.max(1)
        return best.indices, best.values


@torch.no_grad()
def neighbourhood(
    run: Run, name: str, features: torch.Tensor, labels: torch.Tensor, classes: int, *, k: int, temperature: float = 0.5, block: int = 512
) -> Neighbourhood:
    """Compare every embedding with every other one, as a resumable stage.

    One matrix product a block serves votes and energies; no more than `block` rows of the N x N similarities exist at a time.

    Args:
        features: (N, d) float32 of length 1.
        labels: (N,) int64 in 0..classes - 1.
        k: how many neighbours vote; fewer than N. The image itself is none of them.
        temperature: of the energies; below 0.05 the exponentials would underflow.
        block: rows at a time; the result does not depend on it.
    """
    count = len(features)
    if not 0 < k < count:
        raise ValueError(f"{k} neighbours among {count} images")
    if temperature < 0.05:
        raise ValueError(f"temperature {temperature} is below 0.05")
    device = features.device
    votes = torch.zeros(count, classes, dtype=torch.int64, device=device)
    similarities, energies = (torch.zeros(count, classes, device=device) for _ in range(2))
    membership = torch.nn.functional.one_hot(labels, classes).to(features.dtype)
    sizes = membership.sum(0)
    blocks = torch.arange(count, device=device).split(block)
    for index in run.stage(name, total=len(blocks), votes=votes, similarities=similarities, energies=energies):
        rows = blocks[index]
        near = features[rows] @ features.T
        near[torch.arange(len(rows), device=device), rows] = float("-inf")
        nearest = near.topk(k, dim=1, sorted=False)
        theirs = labels[nearest.indices]
        votes[rows] = torch.zeros_like(votes[rows]).scatter_add_(1, theirs, torch.ones_like(theirs))
        similarities[rows] = torch.zeros_like(similarities[rows]).scatter_add_(1, theirs, nearest.values)
        # No similarity exceeds 1: the shift keeps the exponentials in range and cancels in the quotient.
        pull = near.sub_(1).div_(temperature).exp_() @ membership
        others = sizes - membership[rows]
        energies[rows] = pull.log() - others.log() - pull.sum(1, keepdim=True).log()
    # 0 / 0 where the image is the only one of its class.
    return Neighbourhood(votes, similarities, energies.nan_to_num(nan=float("-inf"), neginf=float("-inf")))

"""Trigger inversion: the smallest patch that sends clean images to a label, for one label or all at once.

Labels are independent problems: Adam is element-wise and the model is in eval mode, so stacking their masks (L, H, W)
and patterns (L, C, H, W) and adding their losses gives each label the trajectory it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from core.augment import Augment, none
from core.classifier import Classifier
from core.images import ImageSet, as_floats, at_once
from core.run import Run
from core.training import batches, mixed_precision


@dataclass(frozen=True)
class Triggers:
    """Recovered triggers of L labels.

    Attributes:
        labels: the class each one leads to.
        masks: (L, H, W) in [0, 1]. patterns: (L, C, H, W), pixel space.
        success: share of clean images each one sent to its label in the pass it is from.
    """

    labels: tuple[int, ...]
    masks: torch.Tensor
    patterns: torch.Tensor
    success: tuple[float, ...]

    @property
    def norms(self) -> list[float]:
        """The masks' L1 norms, in pixels."""
        return [float(norm) for norm in self.masks.double().sum((1, 2))]

    def of(self, label: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mask (H, W) and pattern (C, H, W) of one label."""
        index = self.labels.index(label)
        return self.masks[index], self.patterns[index]


def stamp(images: torch.Tensor, mask: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Return `(1 - m) * x + m * Delta` (MCLDef Eq. 1) for images (N, C, H, W), mask (H, W), pattern (C, H, W)."""
    return (1 - mask) * images + mask * pattern


class Objective(Protocol):
    """What is minimised and how it is tuned while it runs; all quantities have one entry a label."""

    rate: float
    betas: tuple[float, float]
    parameters: list[torch.Tensor]
    cost: torch.Tensor

    def trigger(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return masks (L, H, W) and patterns (L, C, H, W) as functions of the parameters."""
        ...

    def project(self) -> None:
        """Bring the parameters back into their domain after an optimizer step."""
        ...

    def update(self, success: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Learn a pass's success rates and mask norms (L,); return which labels are finished (L,) bool."""
        ...

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the masks, patterns and success rates to keep."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a checkpoint must hold."""
        ...


class FixedCost:
    """MCLDef's objective (Eq. 2): cross-entropy + lambda * ||m||_1, clamped after every step, last iterate kept.

    Args:
        count: labels. shape: (C, H, W).
        patience: a label ends after more than this many passes without a smaller mask norm.
        tolerance: share by which a norm must fall below the last one that did, to count as smaller; 0 as published.
        scale, offset: (C,) the pattern is `offset + scale * p` with p in [0, 1]; (1, 0) is pixel space.
    """

    rate = 0.005
    betas = (0.9, 0.999)

    def __init__(
        self,
        count: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        weight: float,
        patience: int,
        scale: torch.Tensor,
        offset: torch.Tensor,
        tolerance: float = 0.0,
    ) -> None:
        device = scale.device
        self._pattern = torch.rand(count, *shape, generator=generator).to(device).requires_grad_()
        self._mask = torch.rand(count, *shape[1:], generator=generator).to(device).requires_grad_()
        self.parameters = [self._mask, self._pattern]
        self.cost = torch.full((count,), weight, device=device)
        self._scale, self._offset = scale[:, None, None], offset[:, None, None]
        self._patience, self._tolerance = patience, tolerance
        self._best = torch.full((count,), float("inf"), device=device)
        self._stalled = torch.zeros(count, device=device)
        self._success = torch.zeros(count, device=device)

    def trigger(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masks and the patterns in pixel space."""
        return self._mask, self._offset + self._scale * self._pattern

    def project(self) -> None:
        """Clamp both to [0, 1]."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.clamp_(0, 1)

    def update(self, success: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Count passes without a smaller norm."""
        self._success.copy_(success)
        better = norms < self._best * (1 - self._tolerance)
        self._best.copy_(torch.where(better, norms, self._best))
        self._stalled.add_(1).masked_fill_(better, 0)
        return self._stalled > self._patience

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the last iterate, as the published code does."""
        mask, pattern = self.trigger()
        return mask.detach().clone(), pattern.detach().clone(), self._success.clone()

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything `update` and the optimizer change."""
        return {"mask": self._mask, "pattern": self._pattern, "best": self._best, "stalled": self._stalled, "reached": self._success}


class DynamicCost:
    """Neural Cleanse's objective (Wang et al., S&P 2019): tanh parameters and a cost that follows the success rate.

    The cost starts at 0, is set to `initial` after `patience` successful passes, doubled (times `factor`) after as many
    successes and divided by factor**1.5 after as many failures. The smallest successful mask is kept.

    Args:
        count: labels. shape: (C, H, W).
        threshold: success rate in [0, 1] that counts as success.
        stop_patience: passes without a smaller mask after which a label ends.
        tolerance: share by which a mask must fall below the last one that did, to count as smaller; 0 as published, and then the cost must have moved
            both ways before a label ends.
    """

    rate = 0.1
    betas = (0.5, 0.9)

    def __init__(
        self,
        count: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        *,
        device: torch.device,
        threshold: float = 0.99,
        initial: float = 1e-3,
        patience: int = 5,
        factor: float = 2.0,
        tolerance: float = 0.0,
        stop_patience: int = 25,
    ) -> None:
        def start(*size: int) -> torch.Tensor:
            # The original draws mask and pattern uniformly and maps them through arctanh; 2 + eps keeps it finite.
            uniform = torch.rand(count, *size, generator=generator)
            return torch.atanh((uniform - 0.5) * (2 - 1e-4)).to(device).requires_grad_()

        self._mask, self._pattern = start(*shape[1:]), start(*shape)
        self.parameters = [self._mask, self._pattern]
        self.threshold, self.initial, self.patience, self.factor = threshold, initial, patience, factor
        self.tolerance, self.stop_patience = tolerance, stop_patience
        self.cost = torch.zeros(count, device=device)
        self._counters = torch.zeros(4, count, device=device)  # set, up, down, early stop
        self._moved = torch.zeros(2, count, dtype=torch.bool, device=device)  # up, down
        self._best = torch.full((2, count), float("inf"), device=device)  # smallest norm, early-stop reference
        self._kept_mask = torch.zeros(count, *shape[1:], device=device)
        self._kept_pattern = torch.zeros(count, *shape, device=device)
        self._success = torch.zeros(2, count, device=device)  # of the kept trigger, of the last pass

    def trigger(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return masks and patterns in (0, 1)."""
        return torch.tanh(self._mask) / (2 + 1e-7) + 0.5, torch.tanh(self._pattern) / (2 + 1e-7) + 0.5

    def project(self) -> None:
        """Nothing to do: tanh keeps the domain."""

    def update(self, success: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Run the schedule's steps 2 to 6 for every label."""
        good = success >= self.threshold
        better = good & (norms < self._best[0])
        mask, pattern = self.trigger()
        with torch.no_grad():
            self._kept_mask[better] = mask[better]
            self._kept_pattern[better] = pattern[better]
        self._success[0] = torch.where(better, success, self._success[0])
        self._success[1] = success
        self._best[0] = torch.where(better, norms, self._best[0])

        set_, up, down, stop = self._counters
        found = self._best[0].isfinite()
        smaller = found & (self._best[0] < (1 - self.tolerance) * self._best[1])
        stop.copy_(torch.where(found, torch.where(smaller, 0.0, stop + 1), stop))
        self._best[1] = torch.where(smaller, self._best[0], self._best[1])
        free = self.cost == 0
        settled = ~free if self.tolerance else self._moved.all(0)
        finished = settled & (stop >= self.stop_patience)

        set_.copy_(torch.where(free & good, set_ + 1, 0.0))
        arm = free & (set_ >= self.patience)
        self.cost[arm] = self.initial
        up[arm], down[arm] = 0, 0
        self._moved[:, arm] = False

        up.copy_(torch.where(good, up + 1, 0.0))
        down.copy_(torch.where(good, 0.0, down + 1))
        raise_, lower = up >= self.patience, down >= self.patience
        self.cost[raise_] *= self.factor
        self.cost[lower] /= self.factor**1.5
        up[raise_], down[lower] = 0, 0
        self._moved[0] |= raise_
        self._moved[1] |= lower & ~raise_
        return finished

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the smallest successful trigger, or the last iterate of a label that never succeeded."""
        mask, pattern = self.trigger()
        found = self._best[0].isfinite()
        kept_mask, kept_pattern = mask.detach().clone(), pattern.detach().clone()
        kept_mask[found], kept_pattern[found] = self._kept_mask[found], self._kept_pattern[found]
        return kept_mask, kept_pattern, torch.where(found, self._success[0], self._success[1])

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything `update` and the optimizer change."""
        kept = {"kept_mask": self._kept_mask, "kept_pattern": self._kept_pattern, "cost": self.cost, "reached": self._success}
        moving = {"counters": self._counters, "moved": self._moved, "best": self._best}
        return {"mask": self._mask, "pattern": self._pattern, **kept, **moving}


def invert(
    run: Run,
    name: str,
    *,
    classifier: Classifier,
    clean: ImageSet,
    labels: Sequence[int],
    objective: Objective,
    passes: int,
    batch_size: int,
    batches_per_pass: int | None = None,
    augment: Augment = none,
    mixed: bool = True,
) -> Triggers:
    """Recover the triggers of `labels` as one resumable stage.

    One pass goes over `clean` (or `batches_per_pass` batches of it). Labels that the objective calls finished keep
    their parameters and leave the batch.

    Args:
        classifier: put into eval mode and frozen here.
        clean: images on the run's device; their own labels are not used.
        labels: target classes, in the order of the objective's entries.
    """
    frozen = classifier.frozen_copy()
    targets = torch.tensor(list(labels), device=run.device)
    active = torch.ones(len(labels), dtype=torch.bool, device=run.device)
    success = torch.zeros(len(labels), device=run.device)
    optimizer = torch.optim.Adam(objective.parameters, lr=objective.rate, betas=objective.betas)
    generator = run.generator(name)
    tracked: dict[str, Any] = {**objective.state(), "active": active, "success": success}
    stage = run.stage(name, total=passes, optimizer=optimizer, generator=generator, **tracked)
    for _ in stage:
        rows = active.nonzero().squeeze(1)
        hits = torch.zeros(len(labels), device=run.device)
        seen = 0
        kept = [parameter.detach().clone() for parameter in objective.parameters]
        for index, chosen in enumerate(batches(len(clean), batch_size, generator)):
            if index == batches_per_pass:
                break
            images = as_floats(augment(clean.images[chosen.to(run.device)], generator))
            masks, patterns = objective.trigger()
            slopes = torch.zeros_like(masks), torch.zeros_like(patterns)
            for part in rows.split(at_once(images.numel(), len(labels))):
                mask, pattern = masks[part].detach().requires_grad_(True), patterns[part].detach().requires_grad_(True)
                wanted = targets[part].repeat_interleave(len(images))
                with mixed_precision(run.device, enabled=mixed):
                    logits = frozen(_stamp_all(images, mask, pattern)).float()
                errors = F.cross_entropy(logits, wanted, reduction="none").view(len(part), -1).mean(1)
                loss = (errors + objective.cost[part] * mask.abs().sum((1, 2))).sum()
                slopes[0][part], slopes[1][part] = torch.autograd.grad(loss, (mask, pattern))
                hits[part] += (logits.detach().argmax(1) == wanted).view(len(part), -1).sum(1)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward((masks, patterns), slopes)
            optimizer.step()
            objective.project()
            seen += len(images)
        with torch.no_grad():
            for parameter, before in zip(objective.parameters, kept, strict=True):
                parameter[~active] = before[~active]
            success[rows] = hits[rows] / seen
            norms = objective.trigger()[0].abs().sum((1, 2))
            finished = objective.update(success, norms)
            active &= ~finished
            run.metric(f"{name} norm", float(norms.min()), success=float(success.mean()), active=int(active.sum()))
        if not active.any():
            stage.stop()
    masks, patterns, reached = objective.result()
    return Triggers(tuple(int(label) for label in labels), masks, patterns, tuple(float(rate) for rate in reached))


def invert_every_label(
    run: Run,
    name: str,
    *,
    classifier: Classifier,
    clean: ImageSet,
    passes: int = 120,
    batches_per_pass: int = 8,
    batch_size: int = 32,
    success: float = 0.99,
    tolerance: float = 0.0,
    patience: int = 25,
) -> Triggers:
    """Recover a trigger for every class at once with Neural Cleanse's own objective (Wang et al., S&P 2019)."""
    _, channels, height, width = clean.images.shape
    start = run.generator(name, "start")
    shape = (channels, height, width)
    objective = DynamicCost(classifier.classes, shape, start, device=run.device, threshold=success, tolerance=tolerance, stop_patience=patience)
    return invert(
        run,
        name,
        classifier=classifier,
        clean=clean,
        labels=range(classifier.classes),
        objective=objective,
        passes=passes,
        batch_size=min(batch_size, len(clean)),
        batches_per_pass=batches_per_pass,
    )


def anomaly_index(norms: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return `|n - median| / (1.4826 * MAD)` of each mask norm (Neural Cleanse), (L,) float64.

    NumPy's median averages the middle two of an even count, as the original does; zero MAD gives zeros.
    """
    values = np.asarray(norms, dtype=np.float64)
    distance = np.abs(values - np.median(values))
    spread = 1.4826 * np.median(distance)
    return distance / spread if spread > 0 else np.zeros_like(values)


def flagged(norms: Sequence[float], *, threshold: float = 2.0) -> list[int]:
    """Return the positions whose mask is anomalously small, smallest first (Neural Cleanse, index > 2)."""
    values = np.asarray(norms, dtype=np.float64)
    outliers = (values < np.median(values)) & (anomaly_index(values) > threshold)
    return sorted(np.flatnonzero(outliers).tolist(), key=lambda position: values[position])


def _stamp_all(images: torch.Tensor, masks: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """Stamp L triggers on N images: (L * N, C, H, W), label-major, channels-last in memory."""
    pixels = images.permute(0, 2, 3, 1)[None]
    mask = masks[:, None, :, :, None]
    stamped = (1 - mask) * pixels + mask * patterns.permute(0, 2, 3, 1)[:, None]
    return stamped.flatten(0, 1).permute(0, 3, 1, 2)

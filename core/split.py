"""Split: what a cleanser says of every image of a training set, and of the set as a whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from core.catalog import Params
from core.images import ImageSet
from core.outliers import p_value
from core.run import Run, without_nan

Verdict = Literal["poisoned", "no_evidence", "inconclusive"]
BINS = 40
# Below the first the set is called poisoned; up to the second nobody can say.
SIGNIFICANCE, DOUBT = 0.005, 0.05
# Of what one image makes of a class's share: classes whose shares differ by less are not taken to differ by nothing, or one wrong label would be poison.
LEAST_SPREAD = 0.25
# Of every class; mistakes leave some classes with next to none of any other label.
EVERYWHERE = 0.05
# A model that confirms fewer labels than this would find little in any set.
TRUSTED = 0.75


class Cleansing(Params):
    """Base of every cleanser's parameters."""

    trust_verdict: bool = Field(
        default=True,
        title="Trust the verdict",
        description="Keep every image when the set as a whole shows no evidence of poison; false drops the suspects anyway.",
    )


@dataclass(frozen=True)
class Split:
    """A cleanser's judgement.

    Attributes:
        labels: (N,) int64, as given or as relabelled.
        kept: (N,) bool, what stays in the cleansed set, relabelled images among it.
        scores: (N,) float32, larger is more suspicious.
        clean, suspect: (N,) bool, what a training may rely on as clean and as poisoned; the rest is undecided.
        reasons: sentences; `why` (N,) int64 says which one explains an image that was dropped or relabelled.
        verdict, evidence, target: of the whole set, with the sentence that explains it and the class the poison leads to, if it is one.
        missed: a sentence on poison that is probably still in the set, empty where nothing speaks for that.
    """

    labels: torch.Tensor
    kept: torch.Tensor
    scores: torch.Tensor
    clean: torch.Tensor
    suspect: torch.Tensor
    why: torch.Tensor
    reasons: tuple[str, ...]
    verdict: Verdict
    evidence: str
    target: int | None = None
    missed: str = ""

    def settled(self, given: torch.Tensor, params: Cleansing) -> Split:
        """Return the split as the verdict leaves it: a set without evidence keeps its images and labels."""
        if self.verdict != "no_evidence" or not params.trust_verdict:
            return self
        return replace(self, labels=given.to(self.labels.device), kept=torch.ones_like(self.kept))

    def cpu(self) -> Split:
        """Return the split in main memory."""
        return replace(
            self, labels=self.labels.cpu(), kept=self.kept.cpu(), scores=self.scores.cpu(), clean=self.clean.cpu(), suspect=self.suspect.cpu(),
            why=self.why.cpu(),
        )  # fmt: skip

    def relabelled(self, given: torch.Tensor) -> torch.Tensor:
        """Say which kept images have another label than the given ones, (N,) bool."""
        return self.kept & (self.labels != given.to(self.labels.device))

    def cleansed(self, data: ImageSet) -> ImageSet:
        """Return the set that is left."""
        labels = self.labels.to(data.images.device)
        return replace(data, labels=labels).subset(self.kept.nonzero()[:, 0])

    def part(self, data: ImageSet, which: torch.Tensor) -> ImageSet:
        """Return the images of a mask (N,) with their given labels."""
        return data.subset(which.nonzero()[:, 0])


def of_flags(
    given: torch.Tensor,
    scores: torch.Tensor,
    flagged: torch.Tensor,
    reason: str,
    *,
    verdict: Verdict,
    evidence: str,
    target: int | None = None,
    missed: str = "",
    clean: torch.Tensor | None = None,
) -> Split:
    """Return the split of a method that flags images and relabels none: flagged ones are dropped; what is not flagged is clean unless `clean` says."""
    return Split(
        labels=given, kept=~flagged, scores=scores.float(), clean=~flagged if clean is None else clean, suspect=flagged,
        why=torch.zeros_like(given), reasons=(reason,), verdict=verdict, evidence=evidence, target=target, missed=missed,
    )  # fmt: skip


def share_of_each(flagged: torch.Tensor, labels: torch.Tensor, classes: int) -> list[float]:
    """Return for each class the share of its images that are flagged; both (N,)."""
    found: list[float] = (torch.bincount(labels[flagged], minlength=classes) / torch.bincount(labels, minlength=classes).clamp(min=1)).tolist()
    return found


def stands_out(values: list[float], what: str, *, image: float = 0.0, significance: float = SIGNIFICANCE) -> tuple[Verdict, str, int | None]:
    """Return verdict, evidence and class of a set from one number a class, large where a class hides poison (Grubbs' test).

    One class among many is what an attack on one target leaves behind. All classes alike look like none: an all-to-all attack is not seen.

    Args:
        image: how much one image adds to a value that is a share of images; what so few may make of it is `inconclusive`.
        significance: below which chance the set is called poisoned.
    """
    highest = max(range(len(values)), key=lambda label: values[label])
    if len(values) < 4:
        return "inconclusive", f"{len(values)} classes are too few for an outlier test of {what}", highest
    chance, alone = p_value(values, LEAST_SPREAD * image), p_value(values)
    said = f"{what} of class {highest} is {values[highest]:.3g}, of the others {min(values):.3g} to {sorted(values)[-2]:.3g} (p = {chance:.2g})"
    if chance < significance:
        return "poisoned", said, highest
    if image and alone < significance:
        return "inconclusive", f"{said}; so few images may be wrong labels", highest
    return ("inconclusive", said, highest) if chance < DOUBT else ("no_evidence", said, None)


def acquitted(verdict: Verdict, evidence: str, confirmed: torch.Tensor, judge: str) -> tuple[Verdict, str]:
    """Return verdict and evidence; a judge (a model) that knows too little to find anything acquits no set.

    Args:
        confirmed: (N,) bool, the images whose labels the judge predicts.
    """
    share = float(confirmed.float().mean())
    if verdict != "no_evidence" or share >= TRUSTED:
        return verdict, evidence
    return "inconclusive", f"the {judge} confirms only {share:.0%} of the labels, train it longer; {evidence}"


def among_strangers(labels: torch.Tensor, predicted: torch.Tensor, confirmed: torch.Tensor, classes: int, *, judge: str) -> tuple[Verdict, str, int | None]:
    """Return verdict, evidence and class of a set from a judge that did not learn from all of its labels.

    Args:
        labels: (N,), as given. predicted: (N,), what the judge takes the images for.
        confirmed: (N,) bool, the images whose labels it believes.
        judge: what it is.
    """
    shares = shares_among_strangers(labels, predicted, classes)
    verdict, evidence, target = stands_out(shares, "the share of its label among the least similar images", image=classes / len(labels))
    verdict, evidence = acquitted(verdict, evidence, confirmed, judge)
    mixed = mixture(labels, predicted, classes)
    np.fill_diagonal(mixed, 0)
    if verdict == "no_evidence" and (least := float(mixed.max(0).min())) > EVERYWHERE:
        # An attack from every class to another one leaves no outlier.
        return "inconclusive", f"to the {judge} every class holds images, {least:.1%} or more, that carry the label of one other class; {evidence}", None
    return verdict, evidence, target


def shares_among_strangers(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> list[float]:
    """Return for each label its share among the images that look like the classes it is hardly ever mistaken for (the tenth percentile over classes).

    Classes that are alike share their labels in any set; a label among all kinds of images, however unlike, is an attack's.

    Args:
        labels: (N,), as given. predicted: (N,), what the judge takes the images for.
    """
    shares = mixture(labels, predicted, classes)
    return [float(np.quantile(np.delete(shares[label], label), 0.1)) for label in range(classes)]


def mixture(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> np.ndarray:
    """Return each label's share (rows) of the images that are taken for each class (columns), (classes, classes); both arguments (N,)."""
    counts = torch.zeros(classes, classes, dtype=torch.float64, device=labels.device)
    counts.view(-1).index_add_(0, labels * classes + predicted, torch.ones(len(labels), dtype=torch.float64, device=labels.device))
    shares: np.ndarray = (counts / counts.sum(0).clamp(min=1)).cpu().numpy()
    return shares


def summary(split: Split, given: torch.Tensor, classes: int) -> dict[str, Any]:
    """Return the counts and histograms of a settled split, JSON."""
    given = given.to(split.labels.device)
    relabelled = split.relabelled(given)
    scores = split.scores.cpu().double().numpy()
    finite = scores[np.isfinite(scores)]
    edges = np.histogram_bin_edges(finite, bins=BINS) if len(finite) else np.zeros(BINS + 1)

    def counts(part: torch.Tensor) -> list[int]:
        return torch.bincount(given[part], minlength=classes).tolist()

    groups = {"kept": split.kept & ~relabelled, "relabelled": relabelled, "dropped": ~split.kept}
    return {
        "verdict": split.verdict,
        "evidence": split.evidence,
        "target": split.target,
        "missed": split.missed,
        "images": len(given),
        "counts": {name: int(part.sum()) for name, part in groups.items()},
        "flagged": int(split.suspect.sum()),
        "per_class": {name: counts(part) for name, part in groups.items()},
        "histogram": {
            "edges": [float(edge) for edge in edges],
            "counts": {name: np.histogram(scores[part.cpu().numpy()], bins=edges)[0].tolist() for name, part in groups.items()} if len(finite) else {},
        },
    }


def write_manifest(run: Run, split: Split, data: ImageSet) -> None:
    """Write manifest.jsonl: a line an image, `{index, name, action, given, label, score, reason}`; labels are class indices."""
    assert data.labels is not None
    settled, given = split.cpu(), data.labels.cpu()
    relabelled = settled.relabelled(given).tolist()
    kept, labels, scores, why = settled.kept.tolist(), settled.labels.tolist(), settled.scores.tolist(), settled.why.tolist()
    path = run.artifact("manifest.jsonl", kind="manifest", media_type="application/jsonl")
    with path.open("w") as out:
        for index, old in enumerate(given.tolist()):
            action = "relabelled" if relabelled[index] else "kept" if kept[index] else "dropped"
            line = {
                "index": index,
                "name": data.names[index] if data.names else str(index),
                "action": action,
                "given": old,
                "label": labels[index],
                "score": scores[index],
                "reason": "" if action == "kept" else settled.reasons[why[index]],
            }
            out.write(json.dumps(without_nan(line)) + "\n")

"""Which method to start with, for what somebody has; the reasons are what the tables in `benchmarks/` show."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from core.catalog import Kind, Need


@dataclass(frozen=True)
class Proposal:
    """A job worth trying.

    Attributes:
        kind: what it is good for. method, params: what to send as `defense`.
        needs: what must be there. why: the reason, and when to go on to the next one.
    """

    kind: Kind
    method: str
    needs: frozenset[Need]
    why: str
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def defense(self) -> dict[str, Any]:
        """The job's `defense`."""
        return {"method": self.method, **self.params}


MODEL, CLEAN, LABELS, SUSPECT = Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS, Need.SUSPECT_DATASET
# The best first within a kind.
PROPOSALS = (
    Proposal(Kind.INSPECT, "combined", frozenset({MODEL, CLEAN}), "Three methods that see different kinds of triggers, with one verdict and the target class."),
    Proposal(Kind.INSPECT, "mm_bd", frozenset({MODEL}), "Needs no image and sees triggers of any kind; it names the class, not the trigger."),
    Proposal(
        Kind.PURIFY, "mcldef", frozenset({MODEL, CLEAN}),
        "Needs no labels and costs the least accuracy, if the trigger is a patch or a blend that inversion finds. A job that ends as not_purified says "
        "that it was not: go on to the next.",
    ),
    Proposal(
        Kind.PURIFY, "ft_sam", frozenset({MODEL, CLEAN, LABELS}),
        "Does not depend on one recovered trigger, sees warps and blends, too; slower, and needs labels. It tries no trigger either: inspect its result. Ten times the "
        "published rate, which left 47 to 95 % of a backdoor in a narrow network; of stripes over the whole image 29 % stayed with this one, too.",
        {"learning_rate": 0.1},
    ),
    Proposal(Kind.PURIFY, "clp", frozenset({MODEL}), "The only one without any image, for networks with BatchNorm. It prunes outliers among channels: not for narrow networks."),
    Proposal(
        Kind.CLEANSE, "scan", frozenset({SUSPECT, CLEAN, LABELS}),
        "Clean images of every class, ten of each at least, tell it what is usual: with 250 of each it found 84 to 100 % of the poison of eight attacks, and took no clean image.",
    ),
    Proposal(Kind.CLEANSE, "ssl_cleanse", frozenset({SUSPECT}), "Needs no clean image, but an encoder that has been trained for long, and labels that can be seen to be wrong."),
    Proposal(
        Kind.TRAIN, "retrain", frozenset({SUSPECT, CLEAN, LABELS}), "Trains on what scan leaves; the plain training of the same images is measured beside it.",
        {"split": {"method": "scan"}},
    ),
    Proposal(Kind.TRAIN, "d_br", frozenset({SUSPECT}), "Needs no clean image: unlearns the images that are most sensitive to transformations, relearns the least sensitive ones."),
)  # fmt: skip


def propose(have: Collection[Need]) -> list[Proposal]:
    """Return what can be done with what there is, by kind, the best first."""
    return [proposal for proposal in PROPOSALS if proposal.needs <= set(have)]

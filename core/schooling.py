"""What the defenses that train a model safely have in common: the split they start from, and the plain training they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from core import catalog, victim
from core.catalog import Inputs, Outcome, Params
from core.classifier import Classifier
from core.errors import SplitEmpty
from core.images import ImageSet
from core.run import Run
from core.split import Split

AnySplit = catalog.union(catalog.cleansers())


def split_field(default: str = "fct") -> Any:
    """Return the field `split`: which cleanser's split the training starts from."""
    made = catalog.validate(catalog.cleansers(), {"method": default})
    return Field(default=made, title="Split", description="The method that tells clean images from poisoned ones, with its parameters.")


class Compared(Params):
    """Base of the parameters of every defense that trains a model."""

    compare: bool = Field(default=True, title="Compare", description="Train a model plainly on the same images too, and measure both.")


@dataclass(frozen=True)
class Divided:
    """A suspect set with its split.

    Attributes:
        outcome: of the cleanser. split: its split. clean, poisoned: the images of these parts, with the labels the set gives them.
    """

    outcome: Outcome
    split: Split
    clean: ImageSet
    poisoned: ImageSet

    def findings(self) -> dict[str, Any]:
        """Return what the report says of the split."""
        counts = {"clean": len(self.clean), "poisoned": len(self.poisoned)}
        return {"split": {**counts, "undecided": len(self.split.labels) - sum(counts.values()), **self.outcome.findings}}


def divide(run: Run, inputs: Inputs, params: Any) -> Divided:
    """Split the suspect set by the cleanser that `params` describes.

    Raises `SplitEmpty` when it takes no image for clean, or none for poisoned.
    """
    assert inputs.suspect is not None
    outcome = catalog.cleansers()[params.method].run(run, inputs, params)
    split = outcome.split
    clean, poisoned = (split.part(inputs.suspect, which) for which in (split.clean, split.suspect))
    for what, part in (("clean", clean), ("poisoned", poisoned)):
        if not len(part):
            raise SplitEmpty(f"{params.method} took no image for {what}", "Change its shares or thresholds, or choose another split.")
    return Divided(outcome, split, clean, poisoned)


def plain(run: Run, inputs: Inputs, training: victim.Training, *, architecture: str | None = None) -> Classifier:
    """Return a classifier trained on all of the suspect set by the recipe, as if it could be trusted."""
    assert inputs.suspect is not None
    run.phase("training plainly")
    return victim.train(
        run, inputs.suspect, architecture=architecture or training.architecture, preprocessing=inputs.preprocessing, recipe=training.schedule(), name="plain"
    )  # fmt: skip

"""FT: cross-entropy fine-tuning of all layers on the clean images; the baseline every method must beat."""

from __future__ import annotations

from typing import Literal

from core.catalog import Inputs, Need, Outcome, defense
from core.run import Run
from core.tuning import Repeating, cross_entropy, tune


class FineTuning(Repeating):
    """Parameters; the defaults are those of MCLDef's comparison."""

    method: Literal["fine_tuning"]


@defense(
    title="Fine-tuning",
    paper="Baseline of Liu et al., Fine-Pruning, RAID 2018; settings of MCLDef's comparison",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="The baseline. Without crops (`augment`) a model that makes no errors on the clean images keeps its backdoor. A WRN-16-1 with 2,500 clean images lost 1 to 8 points of accuracy, small models with 300 up to 3.",
)
def run(run: Run, inputs: Inputs, params: FineTuning) -> Outcome:
    """Train on with the clean images and their labels and hope that the backdoor is forgotten."""
    assert inputs.model is not None and inputs.clean is not None
    model = inputs.model.frozen_copy().requires_grad_(True)
    run.phase("fine-tuning")
    return Outcome(model=model, findings={"loss": tune(run, "fine-tune", inputs, params, cross_entropy(model), model=model)})

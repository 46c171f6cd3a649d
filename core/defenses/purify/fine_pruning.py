"""FP: prune the channels that clean images leave quiet, as long as accuracy stands it, then fine-tune."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core.activations import collect
from core.catalog import Inputs, Need, Outcome, defense
from core.run import Run
from core.tuning import Repeating, cross_entropy, tune


class FinePruning(Repeating):
    """Parameters."""

    method: Literal["fine_pruning"]
    tolerance: float = Field(default=0.1, gt=0, lt=1, title="Tolerance", description="Pruning ends before accuracy falls below (1 - this) of what it was.")
    step: float = Field(default=0.01, gt=0, le=1, title="Step", description="Share of the channels pruned at a time.")


@defense(
    title="Fine-pruning",
    paper="Liu et al., Fine-Pruning, RAID 2018",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="Without crops (`augment`) small models with 300 clean images kept most of their backdoors; with them they lost up to 2 points of accuracy, and once 12 % of a blend was left. A WRN-16-1 for "
    "CIFAR-10 kept 8 % of a patch, 50 % of a clean-label one and 88 % of stripes.",
)
def run(run: Run, inputs: Inputs, params: FinePruning) -> Outcome:
    """Prune the dormant inputs of the last linear layer and fine-tune what is left."""
    assert inputs.model is not None and inputs.clean is not None and inputs.clean.labels is not None
    model = inputs.model.frozen_copy().requires_grad_(True)
    run.phase("pruning")
    features = collect(run, model.features, inputs.clean)
    kept, accuracies = _prune(features, model.head, inputs.clean.labels, params)
    held = (~kept).nonzero().squeeze(1)
    findings = {"pruned": len(held), "channels": len(kept), "accuracy": accuracies}
    run.log(f"pruned {len(held)} of {len(kept)} channels", **findings)

    # Weights of pruned channels must stay 0 while the others are tuned: the gradient is cut off, and 0 does not decay.
    hook = model.head.weight.register_hook(lambda slope: slope.masked_fill(~kept, 0))
    with torch.no_grad():
        model.head.weight[:, held] = 0
    run.phase("fine-tuning")
    history = tune(run, "fine-tune", inputs, params, cross_entropy(model), model=model)
    hook.remove()
    return Outcome(model=model, findings={**findings, "loss": history})


def _prune(features: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor, params: FinePruning) -> tuple[torch.Tensor, list[float]]:
    """Return which channels stay, (features,) bool, and the accuracy after each step; it is counted on the clean training images."""
    order = features.mean(0).argsort()
    kept = torch.ones(len(order), dtype=torch.bool, device=features.device)

    def accuracy(which: torch.Tensor) -> float:
        logits = torch.nn.functional.linear(features, head.weight.detach() * which, head.bias.detach())
        return float((logits.argmax(1) == labels).float().mean())

    accuracies = [accuracy(kept)]
    size = max(round(params.step * len(order)), 1)
    for first in range(0, len(order) - 1, size):
        trial = kept.clone()
        trial[order[first : first + size]] = False
        found = accuracy(trial)
        if found < (1 - params.tolerance) * accuracies[0] or not trial.any():
            break
        kept = trial
        accuracies.append(found)
    return kept, accuracies

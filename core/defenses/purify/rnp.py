"""RNP: unlearn the clean task until only the backdoor is left, see which channels carry it, and prune those."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import evaluation, sparing, training
from core.catalog import Inputs, Need, Outcome, defense
from core.images import as_floats
from core.pruning import ChannelMasks
from core.run import Run
from core.sparing import Sparing


class RNP(Sparing):
    """Parameters; the paper uses 1 % of clean images."""

    method: Literal["rnp"]
    unlearning_epochs: int = Field(default=20, ge=1, le=1000, title="Unlearning epochs", description="At most.")
    unlearning_rate: float = Field(default=0.01, gt=0, le=10, title="Learning rate of the unlearning")
    accuracy: float = Field(
        default=0.2, ge=0, le=1, title="Accuracy to reach", description="Unlearning ends when accuracy on the clean images is not above it."
    )
    recovering_epochs: int = Field(default=20, ge=1, le=1000, title="Recovering epochs")
    mask_rate: float = Field(default=0.2, gt=0, le=10, title="Learning rate of the masks")
    alpha: float = Field(default=0.2, gt=0, le=1, title="Alpha", description="Factor of the recovering loss.")
    threshold: float = Field(default=0.7, gt=0, le=1, title="Threshold", description="Channels with a mask at most this large are pruned.")
    batch_size: int = Field(default=128, ge=2, le=4096, title="Batch size")


@defense(
    title="Reconstructive neuron pruning",
    paper="Li et al., Reconstructive Neuron Pruning for Backdoor Defense, ICML 2023",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS, Need.BATCH_NORM),
    caution="Small models with 300 clean images kept most backdoors; pruning all that it suspects (`agreement` 0) cost them up to 89 points of accuracy.",
)
def run(run: Run, inputs: Inputs, params: RNP) -> Outcome:
    """Unlearn neurons, recover channels on the unlearned model, and prune what recovering the clean task does not want."""
    assert inputs.model is not None and inputs.clean is not None and inputs.clean.labels is not None
    clean, labels = inputs.clean, inputs.clean.labels
    unlearned = inputs.model.frozen_copy().requires_grad_(True)
    optimizer = torch.optim.SGD(unlearned.parameters(), lr=params.unlearning_rate, momentum=0.9, weight_decay=5e-4)
    generator = run.generator("unlearn")
    reached: dict[str, Any] = {"accuracy": []}
    run.phase("unlearning")
    stage = run.stage("unlearn", total=params.unlearning_epochs, network=unlearned, optimizer=optimizer, generator=generator, reached=reached)
    for _ in stage:
        unlearned.train()
        for chosen in training.batches(len(clean), params.batch_size, generator, drop_last=True):
            here = chosen.to(run.device)
            optimizer.zero_grad(set_to_none=True)
            (-F.cross_entropy(unlearned(as_floats(clean.images[here])), labels[here])).backward()
            # The negative loss has no lower bound.
            torch.nn.utils.clip_grad_norm_(unlearned.parameters(), 20)
            optimizer.step()
        right = int((evaluation.predict(unlearned, clean.images) == labels).sum())
        reached["accuracy"].append(right / len(clean))
        run.metric("unlearn accuracy", right / len(clean))
        if right / len(clean) <= params.accuracy:
            stage.stop()

    unlearned.requires_grad_(False)
    masks = ChannelMasks(unlearned)
    mask_optimizer = torch.optim.SGD(list(masks.values.values()), lr=params.mask_rate, momentum=0.9)
    run.phase("recovering")
    for _ in run.stage("recover", total=params.recovering_epochs, network=unlearned, optimizer=mask_optimizer, generator=generator, **masks.values):
        unlearned.train()
        for chosen in training.batches(len(clean), params.batch_size, generator, drop_last=True):
            here = chosen.to(run.device)
            mask_optimizer.zero_grad(set_to_none=True)
            (params.alpha * F.cross_entropy(masks.logits(as_floats(clean.images[here])), labels[here])).backward()
            mask_optimizer.step()
            masks.clip()
    outcome = sparing.prune(
        run, inputs, {name: -value.detach() for name, value in masks.values.items()}, least=-params.threshold, agreement=params.agreement
    )  # fmt: skip
    outcome.findings["unlearned_accuracy"] = reached["accuracy"]
    return outcome

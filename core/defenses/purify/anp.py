"""ANP: channels on which a small adversarial change of BatchNorm makes the model err are pruned."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import sparing
from core.catalog import Inputs, Need, Outcome, defense
from core.images import as_floats
from core.pruning import ChannelMasks
from core.run import Run
from core.sparing import Sparing


class ANP(Sparing):
    """Parameters; the paper uses 1 % of clean images."""

    method: Literal["anp"]
    iterations: int = Field(default=2000, ge=1, le=1_000_000, title="Iterations")
    batch_size: int = Field(default=128, ge=2, le=4096, title="Batch size", description="Drawn with replacement.")
    epsilon: float = Field(default=0.4, gt=0, le=10, title="Epsilon", description="The relative change of weights and biases.")
    steps: int = Field(default=1, ge=1, le=100, title="Noise steps")
    alpha: float = Field(default=0.2, ge=0, le=1, title="Alpha", description="Weight of the loss without noise.")
    mask_rate: float = Field(default=0.2, gt=0, le=10, title="Learning rate of the masks")
    threshold: float = Field(default=0.2, gt=0, le=1, title="Threshold", description="Channels with a mask at most this large are pruned.")


@defense(
    title="Adversarial neuron pruning",
    paper="Wu and Wang, Adversarial Neuron Pruning Purifies Backdoored Deep Models, NeurIPS 2021",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS, Need.BATCH_NORM),
    caution="Small models, and a WRN-16-1 for CIFAR-10, kept nearly every backdoor: with its published threshold it takes out few channels or none.",
)
def run(run: Run, inputs: Inputs, params: ANP) -> Outcome:
    """Learn which channels stand adversarial noise on BatchNorm, and prune the others."""
    assert inputs.model is not None and inputs.clean is not None and inputs.clean.labels is not None
    clean, clean_labels = inputs.clean, inputs.clean.labels
    # Masks are learnt on a copy: its running statistics drift, and only the masks are kept.
    trial = inputs.model.frozen_copy()
    masks = ChannelMasks(trial)
    optimizer = torch.optim.SGD(list(masks.values.values()), lr=params.mask_rate, momentum=0.9)
    generator = run.generator("anp")
    run.phase("learning masks")
    stage = run.stage("learn masks", total=params.iterations, trial=trial, optimizer=optimizer, generator=generator, **masks.values)
    for _ in stage:
        trial.train()
        chosen = torch.randint(len(clean), (params.batch_size,), generator=generator).to(run.device)
        images, labels = as_floats(clean.images[chosen]), clean_labels[chosen]
        noise = {name: _start(value, params.epsilon, generator) for name, value in masks.values.items()}
        for _ in range(params.steps):
            flat = [part.requires_grad_(True) for pair in noise.values() for part in pair]
            slopes = torch.autograd.grad(F.cross_entropy(masks.logits(images, noise), labels), flat)
            moved = [part.detach() + params.epsilon / params.steps * slope.sign() for part, slope in zip(flat, slopes, strict=True)]
            noise = dict(zip(noise, zip(moved[::2], moved[1::2], strict=True), strict=True))
        plain = F.cross_entropy(masks.logits(images), labels)
        loss = params.alpha * plain + (1 - params.alpha) * F.cross_entropy(masks.logits(images, noise), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        masks.clip()
    return sparing.prune(
        run, inputs, {name: -value.detach() for name, value in masks.values.items()}, least=-params.threshold, agreement=params.agreement
    )  # fmt: skip


def _start(mask: torch.Tensor, epsilon: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noise for a layer's weights and biases, uniformly in [-epsilon, epsilon]."""
    drawn = (torch.rand(2, len(mask), generator=generator) * 2 - 1) * epsilon
    weight, bias = drawn.to(mask.device)
    return weight, bias

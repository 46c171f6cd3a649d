"""CLP: channels whose Lipschitz bound is an outlier in their layer are pruned; no data at all."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from core import pruning
from core.catalog import Inputs, Need, Outcome, Params, defense
from core.run import Run


class CLP(Params):
    """Parameters."""

    method: Literal["clp"]
    deviations: float = Field(
        default=3.0,
        gt=0,
        le=100,
        title="Deviations",
        description="Prune above mean + this many standard deviations; 3 on CIFAR-10 and GTSRB, 5 on Tiny ImageNet.",
    )


@defense(
    title="Channel Lipschitz pruning",
    paper="Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022",
    needs=(Need.MODEL, Need.BATCH_NORM),
    caution="Its outlier test expects wide layers: narrow networks kept most backdoors and lost up to 9 points of accuracy.",
)
def run(run: Run, inputs: Inputs, params: CLP) -> Outcome:
    """Prune the channels that could react most strongly to a small change, judged from the weights alone."""
    assert inputs.model is not None
    model = inputs.model.frozen_copy().requires_grad_(True)
    run.phase("pruning")
    size = model.architecture.input_size
    pairs = pruning.fed_by_convolutions(model, torch.zeros(1, model.architecture.channels, size, size, device=run.device))
    layers = pruning.batch_norms(model)
    chosen = {}
    for name, conv in pairs.items():
        bound = lipschitz(conv.weight, layers[name])
        chosen[name] = bound > bound.mean() + params.deviations * bound.std()
    findings = pruning.remove(model, chosen, bias=True)
    run.log(f"pruned {findings['pruned']} of {findings['channels']} channels; {len(pairs)} of {len(layers)} BatchNorm layers follow a convolution")
    inputs.watch(model)
    return Outcome(model=model.eval(), findings=findings)


def lipschitz(weight: torch.Tensor, bn: torch.nn.BatchNorm2d) -> torch.Tensor:
    """Return each output channel's bound, (channels,): the largest singular value of its kernels (in, k * k) times |gamma| / sigma."""
    assert bn.running_var is not None
    largest = torch.linalg.svdvals(weight.detach().flatten(2).double())[:, 0]
    return largest * (bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()).abs()

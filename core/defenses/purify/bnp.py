"""BNP: channels whose distribution on clean images differs from the one BatchNorm recorded on poisoned ones are pruned."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from core import pruning, sparing
from core.catalog import Inputs, Need, Outcome, defense
from core.images import as_floats
from core.run import Run
from core.sparing import Sparing


class BNP(Sparing):
    """Parameters."""

    method: Literal["bnp"]
    deviations: float = Field(default=3.0, gt=0, le=100, title="Deviations", description="Prune above mean + this many standard deviations of the divergence.")


@defense(
    title="BatchNorm statistics pruning",
    paper="Zheng et al., Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022 (BNP)",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.BATCH_NORM),
    caution="On narrow networks most triggers but patches survived; pruning all that it suspects (`agreement` 0) cost them up to 27 points of accuracy.",
)
def run(run: Run, inputs: Inputs, params: BNP) -> Outcome:
    """Prune the channels whose inputs on clean images diverge from the statistics recorded in training; no labels."""
    assert inputs.model is not None and inputs.clean is not None
    model = inputs.model.frozen_copy()
    run.phase("comparing")
    layers = pruning.batch_norms(model)
    # Sums over images and places: count, sum, sum of squares.
    sums = {name: torch.zeros(3, layer.num_features, dtype=torch.float64, device=run.device) for name, layer in layers.items()}

    def add(name: str) -> Any:
        def hook(bn: torch.nn.Module, args: Any) -> None:
            values = args[0].detach().double()
            sums[name][0] += values.numel() / values.shape[1]
            sums[name][1] += values.sum((0, 2, 3))
            sums[name][2] += values.square().sum((0, 2, 3))

        return hook

    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for chunk in inputs.clean.images.split(250):
            run.check_cancelled()
            model(as_floats(chunk))
    for hook in hooks:
        hook.remove()
    suspicion = {}
    for name, layer in layers.items():
        count, total, squares = sums[name]
        mean = total / count
        found = divergence(mean, (squares / count - mean.square()).clamp(min=0), layer)
        suspicion[name] = (found - found.mean()) / found.std()
    return sparing.prune(run, inputs, suspicion, least=params.deviations, agreement=params.agreement)


def divergence(mean: torch.Tensor, variance: torch.Tensor, bn: torch.nn.BatchNorm2d) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of each channel's Gaussian on clean images from the recorded one, (channels,) float64."""
    assert bn.running_mean is not None and bn.running_var is not None
    here, recorded = variance + bn.eps, bn.running_var.double() + bn.eps
    return 0.5 * ((recorded / here).log() + (here + (mean - bn.running_mean.double()).square()) / recorded - 1)

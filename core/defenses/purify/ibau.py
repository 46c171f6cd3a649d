"""I-BAU: unlearn a universal perturbation in a minimax game, with gradients through the inner problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.catalog import Inputs, Need, Outcome, Params, defense
from core.classifier import Classifier
from core.errors import Diverged
from core.images import as_floats
from core.run import Run
from core.training import batches, finite
from core.tuning import epoch_images_field


class IBAU(Params):
    """Parameters; Trap-and-Replace's comparison takes `inner_rate` 1 and `learning_rate` 1e-4 for WRN-16-1."""

    method: Literal["ibau"]
    rounds: int = Field(default=5, ge=1, le=1000, title="Rounds")
    batch_size: int = Field(default=100, ge=2, le=4096, title="Batch size")
    inner_rate: float = Field(default=10.0, gt=0, le=1000, title="Inner learning rate", description="Of the perturbation.")
    learning_rate: float = Field(default=1e-3, gt=0, le=10, title="Learning rate", description="Of the weights.")
    norm_weight: float = Field(default=0.001, ge=0, le=100, title="Norm weight", description="Of the perturbation's squared norm.")
    share: float = Field(default=0.01, ge=0, le=1, title="Perturbed share", description="Of each batch; at least one image.")
    iterations: int = Field(default=5, ge=1, le=100, title="Fixed-point iterations", description="K of the implicit gradient.")
    contraction: float = Field(default=0.1, gt=0, le=10, title="Contraction", description="Step of the fixed-point map.")
    epoch_images: int = epoch_images_field()


@defense(
    title="I-BAU",
    paper="Zeng et al., Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="Small models with 300 clean images lost up to 7 points of accuracy, a WRN-16-1 with 2,500 lost 2 to 7, and blended, striped and warped triggers may survive.",
)
def run(run: Run, inputs: Inputs, params: IBAU) -> Outcome:
    """Find the perturbation that misleads most clean images, and train so that the best such perturbation does less."""
    assert inputs.model is not None and inputs.clean is not None
    clean = inputs.clean.repeated(params.epoch_images)
    all_labels = clean.labels
    assert all_labels is not None
    model = inputs.model.frozen_copy().requires_grad_(True)
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=params.learning_rate)
    generator = run.generator("unlearn")
    losses: dict[str, list[float]] = {"loss": []}
    run.phase("unlearning")
    for _ in run.stage("unlearn", total=params.rounds, network=model, optimizer=optimizer, generator=generator, losses=losses):
        delta = torch.zeros(clean.images.shape[1:], device=run.device, requires_grad=True)
        inner = torch.optim.SGD([delta], lr=params.inner_rate)
        for chosen in batches(len(clean), params.batch_size, generator):
            run.check_cancelled()
            images = as_floats(clean.images[chosen.to(run.device)])
            with torch.no_grad():
                predicted = model(images).argmax(1)
            (slope,) = torch.autograd.grad(_misleading(model, images, predicted, delta, params.norm_weight), delta)
            delta.grad = slope
            inner.step()

        order = list(batches(len(clean), params.batch_size, generator))
        first = order[0].to(run.device)
        reference = as_floats(clean.images[first]), all_labels[first]
        total = 0.0
        for chosen in order:
            run.check_cancelled()
            here = chosen.to(run.device)
            images, labels = as_floats(clean.images[here]), all_labels[here]
            hit = torch.zeros(len(images), 1, 1, 1, device=run.device)
            hit[torch.randperm(len(images), generator=generator)[: max(int(params.share * len(images)), 1)].to(run.device)] = 1
            loss = F.cross_entropy(model(images + hit * delta), labels)
            # Only attention's plain form has second derivatives.
            with sdpa_kernel(SDPBackend.MATH):
                inner_slope = torch.autograd.grad(_misleading(model, *reference, delta, params.norm_weight), delta, create_graph=True)[0]
            fixed_point = delta - params.contraction * inner_slope
            for weight, slope in zip(weights, implicit_gradient(loss, fixed_point, delta, weights, params.iterations), strict=True):
                weight.grad = slope
            optimizer.step()
            total += float(loss.detach()) * len(images)
        if not finite(model):
            raise Diverged("a weight became NaN or infinite while unlearning", "Use a lower `learning_rate` or `inner_rate`.")
        losses["loss"].append(total / len(clean))
        run.metric("unlearn loss", total / len(clean), perturbation=float(delta.detach().norm()))
        inputs.watch(model)
    return Outcome(model=model.eval(), findings=dict(losses))


def _misleading(model: Classifier, images: torch.Tensor, labels: torch.Tensor, delta: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the inner loss: small when the perturbation (C, H, W) misleads and is itself small."""
    return -F.cross_entropy(model(images + delta), labels) + weight * delta.square().sum()


def implicit_gradient(
    outer: torch.Tensor, fixed_point: torch.Tensor, delta: torch.Tensor, weights: Sequence[torch.Tensor], iterations: int
) -> tuple[torch.Tensor, ...]:
    """Return d outer / d weights where delta solves delta = fixed_point(delta, weights): K fixed-point iterations (Grazzi et al., ICML 2020).

    Args:
        outer: a scalar of delta and weights. fixed_point: Phi(delta, weights), shaped as delta, with its graph.
    """
    on_delta, *direct = torch.autograd.grad(outer, [delta, *weights], retain_graph=True, allow_unused=True)
    on_delta = torch.zeros_like(delta) if on_delta is None else on_delta
    # The first iteration starts at zero and ends here.
    v = on_delta
    for _ in range(iterations - 1):
        v = torch.autograd.grad(fixed_point, delta, v, retain_graph=True)[0] + on_delta
    through = torch.autograd.grad(fixed_point, weights, v, allow_unused=True)
    pairs = zip(direct, through, weights, strict=True)
    return tuple(sum((part for part in (a, b) if part is not None), torch.zeros_like(weight)) for a, b, weight in pairs)

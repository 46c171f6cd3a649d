"""SAU: find the adversarial examples that the model shares with its backdoored self, and unlearn those."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import training
from core.catalog import Inputs, Need, Outcome, defense
from core.classifier import Classifier
from core.losses import unlikelihood
from core.run import Run
from core.tuning import Tuning, epochs_field, rate_field, tune


class SAU(Tuning):
    """Parameters."""

    method: Literal["sau"]
    epochs: int = epochs_field(100, "Rounds")
    batch_size: int = Field(default=256, ge=2, le=4096, title="Batch size")
    learning_rate: float = rate_field(1e-4, "Of Adam, constant.")
    epsilon: float = Field(default=0.2, gt=0, le=1, title="Epsilon", description="L-infinity bound in [0, 1].")
    step: float = Field(default=0.2, gt=0, le=1, title="Step size")
    steps: int = Field(default=5, ge=1, le=1000, title="Steps")
    adversarial_weight: float = Field(default=0.01, ge=0, le=100, title="Weight of misleading", description="beta 1.")
    shared_weight: float = Field(default=1.0, ge=0, le=100, title="Weight of sharing", description="beta 2.")
    bn: Literal["frozen", "train"] = Field(default="frozen", title="BatchNorm mode", description="`frozen`: the model stays in eval mode.")


@defense(
    title="Shared adversarial unlearning",
    paper="Wei et al., Shared Adversarial Unlearning, NeurIPS 2023",
    needs=(Need.MODEL, Need.CLEAN_IMAGES, Need.CLEAN_LABELS),
    caution="Small models with 300 clean images lost up to 12 points of accuracy, the target class up to 98 points of its own, and patches survived.",
)
def run(run: Run, inputs: Inputs, params: SAU) -> Outcome:
    """Unlearn the adversarial examples that mislead the model and its frozen backdoored copy alike."""
    assert inputs.model is not None
    backdoored = inputs.model.frozen_copy()
    model = inputs.model.frozen_copy().requires_grad_(True)

    def loss(images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        moved = shared_adversarial(model, backdoored, images, labels, params)
        logits = model(torch.cat([images, moved])).float()
        plain, attacked = logits.chunk(2)
        with torch.no_grad():
            wrong = backdoored(moved).float().argmax(1)
        unlearn = unlikelihood(attacked, wrong) * (wrong != labels)
        return F.cross_entropy(plain, labels) + unlearn.sum() / len(images)

    run.phase("unlearning")
    history = tune(
        run, "unlearn", inputs, params, loss, model=model, optimizer=torch.optim.Adam(model.parameters(), lr=params.learning_rate, amsgrad=True),
        schedule=training.steps((0, params.learning_rate)), prepare=lambda: model.train(params.bn == "train"),
    )  # fmt: skip
    return Outcome(model=model, findings={"loss": history})


def shared_adversarial(model: Classifier, backdoored: Classifier, images: torch.Tensor, labels: torch.Tensor, params: SAU) -> torch.Tensor:
    """Return images (N, C, H, W) in [0, 1], moved so that both models err in the same way where that is possible."""
    modes = model.training
    model.eval()
    delta = (images + params.epsilon).clamp(0, 1) - images
    for _ in range(params.steps):
        delta = delta.detach().requires_grad_(True)
        now, then = model(images + delta).float(), backdoored(images + delta).float()
        loss, done = _shared_loss(now, then, labels, params)
        if bool(done.all()):
            break
        (slope,) = torch.autograd.grad(loss, delta)
        moved = (delta.detach() - params.step * slope.sign()).clamp(-params.epsilon, params.epsilon)
        # An example that is shared stays as it is.
        moved = torch.where(done[:, None, None, None], delta.detach(), moved)
        delta = (images + moved).clamp(0, 1) - images
    model.train(modes)
    return (images + delta).detach()


def _shared_loss(now: torch.Tensor, then: torch.Tensor, labels: torch.Tensor, params: SAU) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the perturbation minimises, and which examples are shared already, (N,) bool."""
    wrong_now, wrong_then = now.argmax(1) != labels, then.argmax(1) != labels
    shared = wrong_now & wrong_then & (now.argmax(1) == then.argmax(1))
    mislead = -(F.cross_entropy(now, labels, reduction="none") * ~wrong_now + F.cross_entropy(then, labels, reduction="none") * ~wrong_then) / 2
    p, q = now.softmax(1), then.softmax(1)
    middle = ((p + q) / 2).clamp(min=1e-12).log()
    apart = (p * (p.clamp(min=1e-12).log() - middle) + q * (q.clamp(min=1e-12).log() - middle)).sum(1) / 2
    return (params.adversarial_weight * mislead + params.shared_weight * apart * ~shared).sum(), shared

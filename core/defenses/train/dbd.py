"""DBD: decouple: learn to see without labels, fit a classifier robustly, then go on with the labels of the half that it believes."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import encoders, training, victim
from core.activations import collect, observed
from core.augment import crop_and_flip
from core.catalog import Inputs, Need, Outcome, defense
from core.classifier import Classifier
from core.encoders import Encoding
from core.images import ImageSet, as_floats
from core.losses import symmetric_cross_entropy
from core.run import Run
from core.schooling import Compared, plain
from core.split import among_strangers, of_flags
from core.training import mixed_precision

REASON = "its label is among the half that the classifier believes least"


class DBD(Compared, Encoding, victim.Training):
    """Parameters; the defaults are the published ones for CIFAR-10."""

    method: Literal["dbd"]
    projector: Literal["linear", "mlp"] = Field(default="mlp", title="Projector", description="`mlp` has a hidden layer as wide as the features.")
    encoder_rate: float = Field(default=0.4, gt=0, le=10, title="Learning rate of the encoder")
    temperature: float = Field(default=0.5, gt=0, le=10, title="Temperature", description="Of the encoder's loss.")
    head_epochs: int = Field(default=10, ge=1, le=1000, title="Epochs of the linear classifier", description="With symmetric cross-entropy.")
    epochs: int = Field(default=190, ge=1, le=1000, title="Epochs", description="Of semi-supervised training.")
    iterations: int = Field(default=1024, ge=1, le=100_000, title="Iterations", description="An epoch.")
    batch_size: int = Field(default=64, ge=2, le=4096, title="Batch size", description="Of labelled and of unlabelled images.")
    learning_rate: float = Field(default=2e-3, gt=0, le=1, title="Learning rate", description="Of Adam.")
    believed: float = Field(default=0.5, gt=0, lt=1, title="Believed share", description="Images with the lowest loss keep their labels.")
    sharpening: float = Field(default=0.5, gt=0, le=10, title="Sharpening", description="MixMatch's temperature.")
    mixing: float = Field(default=0.75, gt=0, le=100, title="Mixing", description="MixMatch's beta distribution.")
    unlabelled_weight: float = Field(default=15.0, ge=0, le=1000, title="Weight of unlabelled images", description="Reached linearly at the end.")


@defense(
    title="DBD",
    paper="Huang et al., Backdoor Defense via Decoupling the Training Process, ICLR 2022",
    needs=(Need.SUSPECT_DATASET,),
    caution="The baseline. On small sets, with fewer steps than published, it kept a patch and a warp out for 3 points of accuracy, and a blend, which its encoder saw, in.",
)
def run(run: Run, inputs: Inputs, params: DBD) -> Outcome:
    """Train an encoder without labels, a linear head with symmetric cross-entropy, and both by MixMatch on the labels with the lowest loss."""
    suspect = inputs.suspect
    assert suspect is not None and suspect.labels is not None
    labels = suspect.labels.to(run.device)
    encoder = encoders.untrained(run, "encoder", suspect, params, inputs.preprocessing)
    run.phase("learning to see")
    encoding = encoders.contrast(run, "encoder", encoder, suspect, params, temperature=params.temperature)
    model = encoder.backbone
    run.phase("learning to classify")
    model.requires_grad_(False)
    model.head.requires_grad_(True)

    def robust(images: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = model.features(images)
        return symmetric_cross_entropy(model.head(features), given).mean()

    heading = training.fit(
        run, "head", data=suspect, loss=training.supervised(robust), network=model, optimizer=torch.optim.Adam(model.head.parameters(), lr=2e-3),
        schedule=training.steps((0, 2e-3)), epochs=params.head_epochs, batch_size=min(128, len(suspect)), augment=crop_and_flip(mirror=params.mirror), prepare=model.eval,
    )  # fmt: skip
    model.requires_grad_(True)
    run.phase("training on what is believed")
    history = match(run, inputs, model, suspect, labels, params)
    logits = collect(run, model.eval(), suspect)
    losses = symmetric_cross_entropy(logits, labels)
    doubted = losses > losses.kthvalue(max(int(params.believed * len(losses)), 1)).values
    # A class that is hard to learn is doubted in clean sets too; a label on all kinds of images is an attack's.
    predicted = logits.argmax(1)
    verdict, evidence, target = among_strangers(labels, predicted, predicted == labels, suspect.classes, judge="model")
    if verdict == "no_evidence":
        # A backdoor that was learnt agrees with its labels; what it is made of shows in the activations.
        verdict, more, target = observed(model, collect(run, model.features, suspect), labels, suspect.classes, run.seed)
        evidence = f"{evidence}; {more}"
    split = of_flags(labels, losses, doubted, REASON, verdict=verdict, evidence=evidence, target=target)
    findings = {"encoder_loss": encoding, "head_loss": heading, "loss": history}
    return Outcome(model=model.eval(), baseline=plain(run, inputs, params) if params.compare else None, split=split, findings=findings)


def match(run: Run, inputs: Inputs, model: Classifier, data: ImageSet, labels: torch.Tensor, params: DBD) -> list[float]:
    """Train by MixMatch, in place, as a resumable stage; each epoch anew, the images with the lowest loss are labelled. Return each epoch's mean loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=params.learning_rate)
    generator = run.generator("match")
    history: dict[str, list[float]] = {"loss": []}
    view = crop_and_flip(mirror=params.mirror)
    for epoch in run.stage("match", total=params.epochs, model=model, optimizer=optimizer, generator=generator, history=history):
        order = symmetric_cross_entropy(collect(run, model.eval(), data), labels).argsort(stable=True).cpu()
        cut = int(params.believed * len(order))
        pools = (order[:cut], order[cut:])
        model.train()
        total = torch.zeros((), device=run.device)
        for step in range(params.iterations):
            weight = params.unlabelled_weight * (epoch + step / params.iterations) / params.epochs
            first, second = (pool[torch.randint(len(pool), (params.batch_size,), generator=generator)] for pool in pools)
            images, again, other = (as_floats(view(data.images[which.to(data.images.device)].to(run.device), generator)) for which in (first, second, second))
            wanted = F.one_hot(labels[first.to(run.device)], model.classes).float()
            with mixed_precision(run.device):
                loss = mixmatch(model, images, wanted, (again, other), params, weight, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        training.check(f"match, epoch {epoch + 1}", float(total), model)
        history["loss"].append(float(total) / params.iterations)
        run.metric("match loss", history["loss"][-1], epoch=epoch + 1)
        inputs.watch(model)
        model.train()
    return history["loss"]


def mixmatch(
    model: Classifier,
    images: torch.Tensor,
    wanted: torch.Tensor,
    unlabelled: tuple[torch.Tensor, ...],
    params: DBD,
    weight: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return MixMatch's loss (Berthelot et al., NeurIPS 2019): cross-entropy on mixed labelled images, `weight` times the squared error on unlabelled ones.

    Args:
        images: (B, C, H, W). wanted: (B, classes), one-hot. unlabelled: views of other images, (B, C, H, W) each.
    """
    with torch.no_grad():
        guess = torch.stack([model(view).float().softmax(1) for view in unlabelled]).mean(0) ** (1 / params.sharpening)
        guess = guess / guess.sum(1, keepdim=True)
    everything, targets = torch.cat([images, *unlabelled]), torch.cat([wanted, *(guess for _ in unlabelled)])
    share = _beta(params.mixing, generator)
    share = max(share, 1 - share)
    order = torch.randperm(len(everything), generator=generator).to(everything.device)
    mixed, soft = share * everything + (1 - share) * everything[order], share * targets + (1 - share) * targets[order]
    logits = model(mixed).float()
    own = len(images)
    supervised = -(soft[:own] * logits[:own].log_softmax(1)).sum(1).mean()
    return supervised + weight * (logits[own:].softmax(1) - soft[own:]).square().mean()


def _beta(parameter: float, generator: torch.Generator) -> float:
    """Draw from Beta(a, a) with the run's own generator: torch's distributions only know the global one."""
    import numpy as np

    return float(np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator))).beta(parameter, parameter))

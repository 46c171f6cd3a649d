"""FCT: poisoned images lose their features when they are transformed; the most and the least sensitive ones are told apart."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from core import training, victim
from core.activations import collect, observed, overlooked
from core.augment import TRANSFORMATIONS
from core.catalog import Inputs, Need, Outcome, defense
from core.classifier import Classifier
from core.images import ImageSet
from core.losses import intra_class
from core.run import Run
from core.split import Cleansing, of_flags, share_of_each, stands_out
from core.tuning import cross_entropy

Transformation = Literal["rotate", "affine", "flip", "crop", "blur", "erase"]
REASON = "its features change more under transformation than those of other images"


class FCT(Cleansing):
    """Parameters; the defaults are the published ones for CIFAR-10."""

    method: Literal["fct"]
    architecture: str = Field(default="resnet18-cifar-maxpool", max_length=64, title="Architecture", description="By its name in the catalogue.")
    epochs: int = Field(default=2, ge=1, le=1000, title="Epochs", description="Of plain training, without augmentation.")
    tuning_epochs: int = Field(default=10, ge=0, le=1000, title="Tuning epochs", description="With the intra-class loss alone.")
    batch_size: int = Field(default=128, ge=2, le=4096, title="Batch size")
    learning_rate: float = Field(default=0.01, gt=0, le=10, title="Learning rate")
    clean_share: float = Field(default=0.2, gt=0, lt=1, title="Clean share", description="alpha_c: the least sensitive images, taken for clean.")
    poisoned_share: float = Field(default=0.05, gt=0, lt=1, title="Poisoned share", description="alpha_p: the most sensitive images, taken for poisoned.")
    transformations: list[Transformation] = Field(
        default=["rotate", "affine"], min_length=1, max_length=4, title="Transformations", description="One after the other."
    )
    draws: int = Field(default=1, ge=1, le=100, title="Draws", description="How many random transformations a score is the mean of.")
    ties: Literal["published", "random"] = Field(
        default="published", title="Ties", description="`published` takes all images at the threshold, which can be many; `random` takes the wanted share."
    )
    rewind: bool = Field(
        default=True,
        title="Rewind",
        description="Where tuning went so far that more than half of the images no longer move, go by how they moved after half of its epochs; "
        "narrow networks collapse. As published: false.",
    )
    stratified: bool = Field(default=False, title="Stratified", description="Take the clean share of each label by itself.")


@defense(
    title="FCT",
    paper="Effective backdoor defense by exploiting sensitivity of poisoned samples, NeurIPS 2022, Algorithms 1 and 2",
    needs=(Need.SUSPECT_DATASET,),
    caution="The features of a narrow network (WRN-16-1) collapse: of a set with Trojan patterns its clean part was 99.9 % clean, its poisoned part 64 % poisoned, "
    "of stripes a third to two fifths, of a blend, a warp, label-consistent and all-to-all poison 1 to 10 %.",
)
def run(run: Run, inputs: Inputs, params: FCT) -> Outcome:
    """Train briefly, pull classes together in feature space, and rank images by how far a transformation moves their features."""
    suspect = inputs.suspect
    assert suspect is not None and suspect.labels is not None
    model = victim.untrained(run, "fct", params.architecture, suspect, inputs.preprocessing)
    optimizer = torch.optim.SGD(model.parameters(), lr=params.learning_rate, momentum=0.9, weight_decay=5e-4)
    # The second step goes on with the first one's optimizer and schedule.
    rate = training.cosine(100, params.learning_rate)

    halfway = torch.zeros(len(suspect), device=run.device)

    def fit(name: str, loss: training.Loss, epochs: int, done: int, **more: Any) -> list[float]:
        return training.fit(
            run, name, data=suspect, loss=loss, network=model, optimizer=optimizer, schedule=lambda epoch: rate(int(epoch) + done),
            epochs=epochs, batch_size=min(params.batch_size, len(suspect)), prepare=model.train, **more,
        )  # fmt: skip

    def remember(epoch: int) -> None:
        if params.rewind and epoch == params.tuning_epochs // 2:
            halfway.copy_(sensitivity(run, model, suspect, params))

    run.phase("training")
    history = fit("fct train", cross_entropy(model), params.epochs, 0)
    before = model.frozen_copy()
    run.phase("pulling classes together")
    pull = training.supervised(lambda images, labels: intra_class(model.features(images), labels))
    tuned = fit("fct tune", pull, params.tuning_epochs, params.epochs, after_epoch=remember, state={"halfway": halfway})
    run.phase("transforming")
    scores = sensitivity(run, model, suspect, params)
    rewound = params.rewind and params.tuning_epochs > 1 and still(scores) > 0.5
    if rewound:
        run.warn(f"{still(scores):.0%} of the images no longer move: the features have collapsed; their moves after half of the tuning epochs decide")
        scores = halfway
    labels = suspect.labels.to(scores.device)
    clean, poisoned = divide(run, scores, labels, suspect.classes, params)
    verdict, evidence, target = stands_out(
        share_of_each(poisoned, labels, suspect.classes), "the share of sensitive images", image=suspect.classes / len(labels)
    )
    if int(poisoned.sum()) > max(0.5, 2 * params.poisoned_share) * len(suspect):
        # Classes were pulled into one point each, which no transformation moves: ties at zero would flag everything.
        evidence = f"{int(poisoned.sum())} of {len(suspect)} images are equally sensitive: the features have collapsed; give fewer tuning_epochs or a wider architecture"
        verdict, target = "inconclusive", None
        clean = poisoned = torch.zeros_like(poisoned)
    elif verdict == "poisoned" and (most := float(labels[poisoned].bincount().max() / poisoned.sum())) <= 0.5:
        # Some classes are more sensitive than others in any set; poison is more sensitive than any of them.
        verdict, evidence = "inconclusive", f"only {most:.0%} of the sensitive images carry one label, of poison nearly all would; {evidence}"
    elif verdict == "no_evidence" and still(scores) > 0.5:
        # What is left to move is chance.
        verdict, evidence = "inconclusive", f"{still(scores):.0%} of the images do not move at all: the features have collapsed; {evidence}"
    missed = f"the poisoned part is the most sensitive {params.poisoned_share:.0%} of the set, however many are poisoned; d_br and d_st train on its parts"
    if verdict == "no_evidence":
        # Warps and stripes outlive a rotation: that nothing is more sensitive than the rest is no reason to acquit the set.
        features = collect(run, before.features, suspect)
        verdict, more, target = observed(before, features, labels, suspect.classes, run.seed)
        evidence = f"{evidence}; {more}"
        if verdict == "poisoned" and target is not None:
            missed = overlooked(features, labels, suspect.classes, target, poisoned)
    split = of_flags(
        labels, scores, poisoned, REASON, verdict=verdict, evidence=evidence, target=target, missed=missed if verdict == "poisoned" else "", clean=clean
    )
    findings = {
        "rewound": rewound,
        "train_loss": history,
        "intra_class_loss": tuned,
        "clean_per_class": torch.bincount(labels[clean], minlength=suspect.classes).tolist(),
    }
    return Outcome(split=split, embedding=collect(run, model.features, suspect), findings=findings)


def sensitivity(run: Run, model: Classifier, data: ImageSet, params: FCT) -> torch.Tensor:
    """Return `|| h(x) - h(tau(x)) ||^2` of every image, (N,) float32: the mean over random draws of tau. The model is left in eval mode."""
    model.eval()
    generator = run.generator("fct", "transformations")

    def moved(images: torch.Tensor) -> torch.Tensor:
        before = model.features(images).float()
        total = torch.zeros(len(images), device=images.device)
        for _ in range(params.draws):
            changed = images
            for name in params.transformations:
                changed = TRANSFORMATIONS[name](changed, generator)
            total += (before - model.features(changed).float()).square().sum(1)
        return total / params.draws

    return collect(run, moved, data)


def still(scores: torch.Tensor) -> float:
    """Return the share of scores (N,) that are exactly zero: images of dead (all-zero) features, which no transformation moves."""
    return float((scores == 0).double().mean())


def divide(run: Run, scores: torch.Tensor, labels: torch.Tensor, classes: int, params: FCT) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the masks of the images taken for clean and for poisoned, (N,) bool each (Algorithm 2)."""
    count = len(scores)
    if params.ties == "random":
        # A random order among equals, the same whatever the device.
        shuffled = torch.randperm(count, generator=run.generator("fct", "ties")).to(scores.device)
        order = shuffled[scores[shuffled].argsort(stable=True)]
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(count, device=scores.device)
        scores = ranks
    ascending = scores.sort().values
    poisoned = (
        scores >= ascending[count - int(params.poisoned_share * count)] if int(params.poisoned_share * count) else torch.zeros_like(labels, dtype=torch.bool)
    )
    if not params.stratified:
        return (scores <= ascending[int(params.clean_share * count)]) & ~poisoned, poisoned
    clean = torch.zeros_like(poisoned)
    for label in range(classes):
        own = labels == label
        ascending = scores[own].sort().values
        clean |= own & (scores <= ascending[int(params.clean_share * len(ascending))])
    return clean & ~poisoned, poisoned

"""D-BR: train a model on everything, then unlearn the poisoned and relearn the clean part of the split in turns."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import losses, training, victim
from core.augment import crop_and_flip, none
from core.catalog import Inputs, Need, Outcome, defense
from core.errors import SplitEmpty
from core.run import Run
from core.schooling import AnySplit, Compared, divide, plain, split_field
from core.tuning import cross_entropy


class DBR(Compared, victim.Training):
    """Parameters; as published for CIFAR-10, `bn` is `train`, `unlearning` `ascent`, `only_target` false, and the rest what it is here."""

    method: Literal["d_br"]
    architecture: str = Field(default="resnet18-cifar-maxpool", max_length=64, title="Architecture", description="By its name in the catalogue.")
    split: AnySplit = split_field()
    rounds: int = Field(default=20, ge=1, le=1000, title="Rounds", description="Each unlearns once and relearns once.")
    only_target: bool = Field(
        default=True,
        title="Only the target's",
        description="Where the split says which class the poison leads to, unlearn only those of its poisoned part that carry it: the others are none, and "
        "unlearning them costs accuracy. As published: off.",
    )
    learning_rate: float = Field(default=1e-4, gt=0, le=1, title="Learning rate", description="Constant.")
    batch_size: int = Field(default=128, ge=2, le=4096, title="Batch size")
    augment: bool | None = Field(
        default=None,
        title="Augment",
        description="Random crop and flip while unlearning and relearning; left out: if the recipe of the plain training has it. A trigger that was learnt "
        "in one place is not unlearnt in others.",
    )
    bn: Literal["train", "frozen"] = Field(
        default="frozen",
        title="BatchNorm mode",
        description="`frozen` unlearns what is deployed; `train`, as published: a batch of poisoned images is unlearnt under its own statistics, and a narrow "
        "network keeps the backdoor under those it is deployed with.",
    )
    unlearning: Literal["ascent", "unlikelihood"] = Field(
        default="unlikelihood",
        title="Unlearning",
        description="`unlikelihood` minimises -log(1 - p) of the given class, which is steepest where the model is sure of the trigger, and ends by itself; "
        "`ascent`, as published, turns the sign of the cross-entropy: it has no bound, and hardly a slope there.",
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        le=100,
        title="Clip",
        description="With `ascent`: poisoned images whose cross-entropy is above this are left alone, as it is unbounded without.",
    )


@defense(
    title="D-BR",
    paper="Effective backdoor defense by exploiting sensitivity of poisoned samples, NeurIPS 2022, Eq. 4",
    needs=(Need.SUSPECT_DATASET,),
    caution="It is as good as the split: of a warp of which it missed 28 % an ASR of 33 % stayed, and where it names no class, or a wrong one, clean images are unlearnt. "
    "As published (`bn` train, `unlearning` ascent, `only_target` off) narrow networks keep their backdoors.",
)
def run(run: Run, inputs: Inputs, params: DBR) -> Outcome:
    """Remove the backdoor of a plainly trained model by unlearning the poisoned and relearning the clean part in turns.

    Raises `SplitEmpty` where a part of the split is empty, or nothing in its poisoned part carries the class it names.
    """
    divided = divide(run, inputs, params.split)
    poisoned, target = divided.poisoned, divided.split.target
    if params.only_target and divided.split.verdict == "poisoned" and target is not None:
        assert poisoned.labels is not None
        poisoned = poisoned.subset((poisoned.labels == target).nonzero()[:, 0])
        if not len(poisoned):
            raise SplitEmpty(f"no image that the split takes for poisoned carries class {target}, to which it says the poison leads", "Choose another split.")
    baseline = plain(run, inputs, params)
    model = baseline.frozen_copy().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=params.learning_rate, momentum=0.9, weight_decay=5e-4)
    generator = run.generator("unlearn and relearn")
    descent = cross_entropy(model)
    view = crop_and_flip(mirror=params.mirror) if (params.schedule().augment if params.augment is None else params.augment) else none

    def away(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(images).float()
        if params.unlearning == "unlikelihood":
            return losses.unlikelihood(logits, labels).mean()
        each = F.cross_entropy(logits, labels, reduction="none")
        return -(each if params.clip is None else each.clamp(max=params.clip)).mean()

    history: dict[str, list[float]] = {"unlearning": [], "relearning": []}
    run.phase("unlearning and relearning")
    for number in run.stage("unlearn and relearn", total=params.rounds, model=model, optimizer=optimizer, generator=generator, history=history):
        model.train(params.bn == "train")
        for name, loss, part in (("unlearning", training.supervised(away), poisoned), ("relearning", descent, divided.clean)):
            # The ascent is unbounded: full precision there, and `one_epoch` stops at the first value that is not finite.
            mean = training.one_epoch(
                run, name, data=part, loss=loss, network=model, optimizer=optimizer, schedule=training.steps((0, params.learning_rate)), epoch=number,
                batch_size=min(params.batch_size, len(part)), generator=generator, augment=view, mixed=name == "relearning",
            )  # fmt: skip
            history[name].append(mean)
            run.metric(f"{name} loss", mean, epoch=number + 1)
        model.eval()
        inputs.watch(model)
    findings = {**divided.findings(), "unlearnt": len(poisoned), "unlearning_loss": history["unlearning"], "relearning_loss": history["relearning"]}
    return Outcome(
        model=model.eval(), baseline=baseline if params.compare else None, split=divided.split, embedding=divided.outcome.embedding, findings=findings
    )

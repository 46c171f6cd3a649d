"""ABL: poisoned images are learnt first; the ones with the lowest loss early on are isolated and unlearnt at the end."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from core import training, victim
from core.activations import collect
from core.augment import crop_and_flip, cutout
from core.catalog import Inputs, Need, Outcome, defense
from core.losses import gradient_ascent_trap
from core.run import Run
from core.schooling import Compared, plain
from core.split import of_flags, share_of_each, stands_out
from core.tuning import cross_entropy

REASON = "it was learnt sooner than other images"


class ABL(Compared, victim.Training):
    """Parameters; the defaults are those of the published code."""

    method: Literal["abl"]
    architecture: str = Field(default="wrn-16-1", max_length=64, title="Architecture", description="By its name in the catalogue.")
    isolation_epochs: int = Field(default=10, ge=1, le=1000, title="Isolation epochs", description="20 in the paper.")
    trap: Literal["ascent", "flooding"] = Field(default="ascent", title="Trap", description="`ascent` turns the sign of each image's loss below gamma.")
    gamma: float = Field(default=0.5, ge=0, le=10, title="Gamma")
    isolated_share: float = Field(default=0.01, gt=0, lt=1, title="Isolated share")
    epochs: int = Field(default=60, ge=0, le=1000, title="Epochs", description="Of training on the rest.")
    learning_rate: float = Field(default=0.1, gt=0, le=10, title="Learning rate", description="A tenth after two thirds of the epochs.")
    unlearning_epochs: int = Field(default=5, ge=1, le=1000, title="Unlearning epochs")
    unlearning_rate: float = Field(default=5e-4, gt=0, le=1, title="Learning rate of unlearning")
    batch_size: int = Field(default=128, ge=2, le=4096, title="Batch size")


@defense(
    title="ABL",
    paper="Li et al., Anti-Backdoor Learning: Training Clean Models on Poisoned Data, NeurIPS 2021",
    needs=(Need.SUSPECT_DATASET,),
    caution="The baseline. Of CIFAR-10 with a patch it isolated no poisoned image and kept the whole backdoor; with `trap=flooding` 499 of 500 were poisoned, and ASR fell to "
    "8 %, of a Trojan pattern to 11, for 2 points of accuracy at most (a class 35). On small sets it isolated an easy class instead of a blend's or a warp's poison; accuracy fell by 3 to 28 points.",
)
def run(run: Run, inputs: Inputs, params: ABL) -> Outcome:
    """Isolate the images that are learnt too easily, train on the rest, and unlearn the isolated ones by gradient ascent."""
    suspect = inputs.suspect
    assert suspect is not None and suspect.labels is not None
    model = victim.untrained(run, "abl", params.architecture, suspect, inputs.preprocessing)
    optimizer = torch.optim.SGD(model.parameters(), lr=params.learning_rate, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def easy(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(images)
        if params.trap == "flooding":
            return (F.cross_entropy(logits.float(), labels) - params.gamma).abs() + params.gamma
        return gradient_ascent_trap(logits, labels, gamma=params.gamma)

    def ascend(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(model(images).float(), labels)

    def view(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return cutout(3)(crop_and_flip(mirror=params.mirror)(images, generator), generator)

    run.phase("isolating")
    isolating = training.fit(
        run, "isolate", data=suspect, loss=training.supervised(easy), network=model, optimizer=optimizer,
        schedule=training.steps((0, params.learning_rate)), epochs=params.isolation_epochs, batch_size=params.batch_size, prepare=model.train, mixed=False,
    )  # fmt: skip
    labels = suspect.labels.to(run.device)
    losses = F.cross_entropy(collect(run, model.eval(), suspect), labels, reduction="none")
    isolated = torch.zeros(len(suspect), dtype=torch.bool, device=losses.device)
    isolated[losses.topk(max(int(params.isolated_share * len(suspect)), 1), largest=False).indices] = True
    rest, found = (suspect.subset(part.nonzero()[:, 0]) for part in (~isolated, isolated))
    run.phase("training on the rest")
    after = max(round(params.epochs * 2 / 3), 1)
    tuned = training.fit(
        run, "train", data=rest, loss=cross_entropy(model), network=model, optimizer=optimizer,
        schedule=training.steps((0, params.learning_rate), (after, params.learning_rate / 10)), epochs=params.epochs, batch_size=params.batch_size,
        augment=view, prepare=model.train, after_epoch=lambda epoch: inputs.watch(model),
    ) if params.epochs else []  # fmt: skip
    run.phase("unlearning")
    unlearnt = training.fit(
        run, "unlearn", data=found, loss=training.supervised(ascend), network=model, optimizer=optimizer,
        schedule=training.steps((0, params.unlearning_rate)), epochs=params.unlearning_epochs, batch_size=min(params.batch_size, len(found)),
        prepare=model.train, after_epoch=lambda epoch: inputs.watch(model), mixed=False,
    )  # fmt: skip
    # Easy classes stand out in clean sets too (digits: one of them held all that was learnt first): that is no verdict.
    _, shares, target = stands_out(share_of_each(isolated, labels, suspect.classes), "the share of images learnt first", image=suspect.classes / len(labels))
    evidence = f"of any set some images are learnt first; {shares}"
    split = of_flags(labels, -losses, isolated, REASON, verdict="inconclusive", evidence=evidence, target=target)
    findings = {"isolation_loss": isolating, "training_loss": tuned, "unlearning_loss": unlearnt}
    return Outcome(model=model.eval(), baseline=plain(run, inputs, params) if params.compare else None, split=split, findings=findings)

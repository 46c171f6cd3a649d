"""Poisoning: which images get the trigger, what they are labelled, and the recipe that rebuilds it all bit for bit.

A *trigger* is an attack's parameters with its assets (mask, pattern, warp …). A *recipe* adds which training images it was
put on. Attacks are files under `core/attacks/`; everything they share is here and in `core/triggers.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from core import catalog
from core.catalog import Need, Params
from core.classifier import Classifier
from core.errors import BadRecipe
from core.images import ImageSet
from core.run import Run
from core.triggers import Assets, Shape, draws

Labels = Literal["all_to_one", "all_to_all", "clean", "none"]
Sampling = Literal["S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8"]
Level = Annotated[int, Field(ge=0, le=255)]
Cell = Level | Annotated[list[Level], Field(min_length=3, max_length=3)]
Picture = Annotated[list[Annotated[list[Cell], Field(min_length=1, max_length=512)]], Field(min_length=1, max_length=512)]
# A chunk of CIFAR images as float64 stays in a core's cache.
CHUNK_BYTES = 2_000_000


def labels_field(default: Labels = "all_to_one") -> Any:
    """Return the field `labels` with this attack's default."""
    return Field(
        default=default,
        title="Label rule",
        description="`all_to_one`: to the target. `all_to_all`: y to y + 1 modulo the classes, and `target` plays no part. "
        "`clean`: only images of the target class, labels unchanged. `none`: the poisoned set has no labels.",
    )


def sampling_field(default: Sampling) -> Any:
    """Return the field `sampling` with this attack's default."""
    return Field(
        default=default,
        title="Which images",
        description="Share or count of: `S1` all images; `S2` other classes' images; `S3` the target class's; `S4` all images, for all-to-all; "
        "`S5` every image of the target class with probability 8 x rate; `S6` rate x all images, the first eligible ones of a seeded order whose last "
        "`holdout` is left alone; `S7` `count` images of other classes; `S8` rate x all images, from other classes (from the target class if labels stay).",
    )


def rate_field(default: float) -> Any:
    """Return the field `rate` with this attack's default."""
    return Field(default=default, gt=0, le=1, title="Poisoning rate", description="The share that `sampling` speaks of.")


def quantise_field(default: str | None) -> Any:
    """Return the field `quantise` with this attack's default (None: it depends on the variant)."""
    return Field(default=default, title="Quantisation", description="`saturate` clips and truncates, `trunc` truncates, `wrap` takes the remainder modulo 256.")


class AttackParams(Params):
    """What every attack has: where it leads, and which images are poisoned."""

    target: int = Field(ge=0, le=100_000, title="Target class", description="The class that triggered images are sent to.")
    labels: Labels = labels_field()
    sampling: Sampling = sampling_field("S1")
    rate: float = rate_field(0.1)
    count: int = Field(default=1000, ge=1, le=10**9, title="Count", description="How many images `S7` draws.")
    holdout: float = Field(default=0.05, ge=0, lt=1, title="Holdout", description="The share of images, last in order, that `S6` leaves alone.")
    shuffle: bool = Field(default=True, title="Shuffle", description="Whether `S6` goes through a seeded permutation or through the files as they lie.")
    include_target: bool = Field(default=False, title="Target class too", description="Whether `S8` also draws images of the target class.")
    seed: int = Field(default=0, ge=0, le=2**53 - 1, title="Seed", description="Decides the random parts of the trigger and which images are drawn.")


@dataclass(frozen=True)
class Trigger:
    """An attack's parameters with everything its parameters and training decided.

    Attributes:
        assets: what the attack's file made; `mask` (C, H, W) bool, the pixels it can change, is always among them.
    """

    params: AttackParams
    assets: Assets

    @property
    def attack(self) -> catalog.Attack:
        """The attack's entry in the catalogue."""
        return catalog.attacks()[self.params.method]  # type: ignore[attr-defined]

    def stamp(self, images: torch.Tensor) -> torch.Tensor:
        """Put the test-time trigger on uint8 images (N, C, H, W); they are not changed.

        Raises `BadRecipe` when the images have another size than the trigger.
        """
        self._check(images)
        return _in_chunks(images, lambda chunk, which: self.attack.run(chunk, self.params, self.assets))

    def poison(self, images: torch.Tensor) -> torch.Tensor:
        """Put the training-time trigger on the chosen images, (n, C, H, W) in the recipe's order."""
        self._check(images)
        change = self.attack.poison
        if change is None:
            return self.stamp(images)
        return _in_chunks(images, lambda chunk, which: change(chunk, self.params, self.assets, which))

    def disturb(self, images: torch.Tensor) -> torch.Tensor:
        """Change the images that keep their labels so that only the exact trigger works ("noise mode")."""
        change = self.attack.disturb
        assert change is not None
        return _in_chunks(images, lambda chunk, which: change(chunk, self.params, self.assets, which))

    def wanted(self, labels: torch.Tensor, classes: int) -> torch.Tensor:
        """Return the class that each triggered image should end up in."""
        if self.params.labels == "all_to_all":
            return (labels + 1) % classes
        return torch.full_like(labels, self.params.target)

    def _check(self, images: torch.Tensor) -> None:
        expected = tuple(self.assets["mask"].shape)
        if tuple(images.shape[1:]) != expected:
            raise BadRecipe(f"the trigger is for images of {expected}, these are {tuple(images.shape[1:])} (C, H, W)", "Use images of the trigger's size.")


@dataclass(frozen=True)
class Triggered:
    """Test images with the trigger: what ASR and PA are counted on.

    Attributes:
        images: (n, C, H, W) uint8. labels: their true classes. wanted: the classes the attacker wants.
        target: the target class, or None for all-to-all.
    """

    images: torch.Tensor
    labels: torch.Tensor
    wanted: torch.Tensor
    target: int | None

    def sample(self, count: int, generator: torch.Generator) -> Triggered:
        """Return `count` of them, drawn without replacement (all if there are fewer)."""
        chosen = torch.randperm(len(self.images), generator=generator)[:count]
        return Triggered(self.images[chosen], self.labels[chosen], self.wanted[chosen], self.target)


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set with its hidden ground truth.

    Attributes:
        data: what a victim is trained on.
        chosen: (n,) indices of the images with the trigger.
        disturbed: (m,) indices of images that were changed and keep their labels.
        original: (N,) labels before poisoning.
    """

    data: ImageSet
    chosen: torch.Tensor
    disturbed: torch.Tensor
    original: torch.Tensor

    @property
    def is_poisoned(self) -> torch.Tensor:
        """(N,) bool: whether an image carries the trigger, whatever its label."""
        found = torch.zeros(len(self.data), dtype=torch.bool)
        found[self.chosen] = True
        return found

    def save(self, folder: Path) -> None:
        """Write the set's folder form into `folder/data`, and the truth beside it, where no trainer looks."""
        self.data.save(folder / "data")
        save_file({"chosen": self.chosen, "disturbed": self.disturbed, "original": self.original}, folder / "truth.safetensors")


@dataclass(frozen=True)
class Recipe:
    """All that is needed to rebuild a poisoned training set and a triggered test set.

    Attributes:
        trigger: the attack.
        chosen, disturbed: indices into the clean training set.
        classes: how many classes the labels count.
        source: SHA-256 of the clean training set it belongs to.
        poisoned: SHA-256 of what `poison` makes of it.
    """

    trigger: Trigger
    chosen: torch.Tensor
    disturbed: torch.Tensor
    classes: int
    source: str
    poisoned: str = field(default="")

    def counts(self, labels: torch.Tensor) -> dict[str, Any]:
        """Return what "the poisoning rate" is on a training set with these clean labels (N,): counts, and the share of all images."""
        relabels = self.trigger.params.labels in ("all_to_one", "all_to_all")
        own = labels[self.chosen]
        changed = int((self.trigger.wanted(own, self.classes) != own).sum()) if relabels else 0
        return {"n_poisoned": len(self.chosen), "n_relabelled": changed, "n_disturbed": len(self.disturbed), "fraction_of_n": len(self.chosen) / len(labels)}

    def save(self, path: Path) -> None:
        """Write the recipe as one safetensors file; equal recipes are equal files."""
        tensors = {"chosen": self.chosen, "disturbed": self.disturbed} | {f"asset.{name}": value.contiguous() for name, value in self.trigger.assets.items()}
        described = {
            "attack": self.trigger.params.model_dump(mode="json"),
            "classes": self.classes,
            "source": self.source,
            "poisoned": self.poisoned,
            "assets": {name: _sha256(value) for name, value in sorted(self.trigger.assets.items())},
        }
        # One entry only: safetensors writes several in random order.
        save_file(tensors, path, metadata={"recipe": json.dumps(described, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe that `save` wrote; raises `BadRecipe` when it is none, or an asset is not what it was."""
        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {})["recipe"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            params = catalog.validate(catalog.attacks(), described["attack"])
            assert isinstance(params, AttackParams)
            assets = {name: tensors[f"asset.{name}"] for name in described["assets"]}
            drawn = [tensors["chosen"], tensors["disturbed"], described["classes"], described["source"], described["poisoned"]]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise BadRecipe(f"{path.name} is not a recipe: {error}", "Take the file that the poisoning wrote.") from error
        changed = [name for name, digest in described["assets"].items() if _sha256(assets[name]) != digest]
        if changed:
            raise BadRecipe(f"{path.name}: {', '.join(changed)} differ from their recorded SHA-256", "Take the recipe from its source again.")
        return cls(Trigger(params, assets), *drawn)


def declared(params: AttackParams, shape: Shape, classes: int) -> Trigger:
    """Return the trigger that parameters alone decide, for images of (C, H, W).

    Raises `BadRecipe` when it does not fit the images, the target is no class, or the trigger must be trained first.
    """
    attack = catalog.attacks()[params.method]  # type: ignore[attr-defined]
    if params.labels != "all_to_all" and params.target >= classes:
        raise BadRecipe(f"the attack's target {params.target} is not one of the {classes} classes", "Classes count from 0.")
    if attack.fit is not None and attack.fits_trigger:
        raise BadRecipe(f"{attack.name} has to be trained: its parameters alone do not say what its trigger is", "Give the triggered images instead.")
    return Trigger(params, attack.assets(params, shape))


def plan(run: Run, params: AttackParams, train: ImageSet, surrogate: Classifier | None = None) -> Recipe:
    """Decide everything about poisoning `train`: images drawn, assets made, triggers trained.

    Args:
        surrogate: a clean model (or encoder) of the attacker's, for the attacks that need one.

    Raises `BadRecipe`, before anything is trained, when it cannot be done as written.
    """
    if train.labels is None:
        raise BadRecipe("the training set has no labels, so the target class is unknown", "Give a labelled set; `labels=none` drops them afterwards.")
    attack = catalog.attacks()[params.method]  # type: ignore[attr-defined]
    if params.labels != "all_to_all" and params.target >= train.classes:
        raise BadRecipe(f"the attack's target {params.target} is not one of the {train.classes} classes", "Classes count from 0.")
    if Need.MODEL in attack.needs and surrogate is None:
        raise BadRecipe(f"{attack.name} needs a surrogate: a clean model of the attacker's own", "Train one on the clean images first.")
    chosen = select(train.labels, params)
    disturbed = torch.empty(0, dtype=torch.int64)
    if attack.disturb is not None:
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[chosen] = False
        free = rest.nonzero()[:, 0]
        wanted = int(params.cross_ratio * len(chosen))  # type: ignore[attr-defined]
        if wanted > len(free):
            raise BadRecipe(f"{wanted} images to disturb, but only {len(free)} carry no trigger", "Use a lower rate or cross ratio.")
        disturbed = _draw(free, wanted, params.seed, "disturbed")
    channels, height, width = train.images.shape[1:]
    trigger = Trigger(params, attack.assets(params, (channels, height, width)))
    if attack.fit is not None:
        trigger = Trigger(params, attack.fit(run, params, trigger.assets, train, chosen, surrogate))
    recipe = Recipe(trigger, chosen, disturbed, train.classes, digest(train))
    return replace(recipe, poisoned=digest(poison(train, recipe).data))


def poison(train: ImageSet, recipe: Recipe) -> Poisoned:
    """Rebuild the poisoned training set from the clean one.

    Raises `BadRecipe` when the clean set, or what comes out, is not what the recipe was written for.
    """
    assert train.labels is not None
    if digest(train) != recipe.source:
        raise BadRecipe("the training set is not the one the recipe was written for", "Use the same images in the same order.")
    images, labels = train.images.clone(memory_format=torch.preserve_format), train.labels.clone()
    chosen, params = recipe.chosen, recipe.trigger.params
    images[chosen] = recipe.trigger.poison(train.images[chosen])
    if len(recipe.disturbed):
        images[recipe.disturbed] = recipe.trigger.disturb(train.images[recipe.disturbed])
    if params.labels in ("all_to_one", "all_to_all"):
        labels[chosen] = recipe.trigger.wanted(labels[chosen], recipe.classes)
    data = replace(train, images=images, labels=None if params.labels == "none" else labels)
    if recipe.poisoned and digest(data) != recipe.poisoned:
        raise BadRecipe("the rebuilt training set differs from the recorded one", "The recipe was written by another version of the attack.")
    return Poisoned(data, chosen, recipe.disturbed, train.labels)


def triggered(test: ImageSet, trigger: Trigger, classes: int) -> Triggered:
    """Return the test images that count for ASR with the trigger: those of other classes, or all for all-to-all."""
    assert test.labels is not None
    everywhere = trigger.params.labels == "all_to_all"
    counted = torch.arange(len(test)) if everywhere else (test.labels != trigger.params.target).nonzero()[:, 0]
    labels = test.labels[counted]
    return Triggered(trigger.stamp(test.images[counted]), labels, trigger.wanted(labels, classes), None if everywhere else trigger.params.target)


def given(data: ImageSet, target: int | None, classes: int) -> Triggered:
    """Return triggered images that somebody else made, labelled with their true classes; those of the target class do not count."""
    assert data.labels is not None
    if target is None:
        return Triggered(data.images, data.labels, (data.labels + 1) % classes, None)
    counted = data.subset((data.labels != target).nonzero()[:, 0])
    assert counted.labels is not None
    return Triggered(counted.images, counted.labels, torch.full_like(counted.labels, target), target)


def select(labels: torch.Tensor, params: AttackParams) -> torch.Tensor:
    """Return the sorted indices of the training images that get the trigger.

    Raises `BadRecipe` when the rule and the labels contradict each other or there are too few images.
    """
    total = len(labels)
    everyone = torch.arange(total)
    own, others = everyone[labels == params.target], everyone[labels != params.target]
    clean = params.labels in ("clean", "none")
    rule = params.sampling
    if clean and rule in ("S2", "S4", "S7"):
        raise BadRecipe(
            f"{rule} draws images of other classes, but with labels={params.labels} only the target class may carry the trigger", "Use S3, S5 or S8."
        )
    if clean and rule == "S1":
        raise BadRecipe(f"S1 draws from all classes, but with labels={params.labels} only the target class may carry the trigger", "Use S3, S5 or S8.")
    if not clean and rule in ("S3", "S5"):
        raise BadRecipe(f"{rule} draws from the target class, whose images already carry the target's label", "Use labels=clean, or another rule.")
    if rule == "S5":
        coins = torch.from_numpy(draws(params.seed, "chosen").random(len(own)))
        chosen = own[coins < min(8 * params.rate, 1)]
        wanted = max(len(chosen), 1)
    elif rule == "S6":
        order = torch.from_numpy(draws(params.seed, "order").permutation(total)) if params.shuffle else everyone
        part = order[: total - int(params.holdout * total)]
        eligible = part[(labels[part] == params.target) == clean]
        wanted = int(params.rate * total)
        # A clean-label attack takes the whole class if it is smaller, as the Trap-and-Replace code does.
        wanted = min(wanted, len(eligible)) if clean else wanted
        chosen = eligible[:wanted]
    else:
        pool = {"S1": everyone, "S2": others, "S3": own, "S4": everyone, "S7": others}.get(
            rule, own if clean else everyone if params.include_target else others
        )
        wanted = params.count if rule == "S7" else int(params.rate * (total if rule == "S8" else len(pool)))
        chosen = _draw(pool, wanted, params.seed, "chosen")
    if wanted == 0 or len(chosen) < wanted:
        where = f"class {params.target}" if clean else "the classes it draws from"
        raise BadRecipe(
            f"the attack would poison {wanted} images, but {rule} finds {len(chosen)} in {where}"
            if wanted
            else f"{rule} at rate {params.rate} poisons no image at all",
            "Use another rate or rule, or a larger training set.",
        )
    return chosen.sort().values


def digest(data: ImageSet) -> str:
    """Return the SHA-256 of a set's pixels (in (N, H, W, C) order) and labels."""
    found = hashlib.sha256()
    for chunk in data.images.permute(0, 2, 3, 1).split(4096):
        found.update(chunk.contiguous().cpu().numpy().tobytes())
    if data.labels is not None:
        found.update(data.labels.cpu().numpy().astype("<i8").tobytes())
    return found.hexdigest()


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(str((tensor.dtype, tuple(tensor.shape))).encode() + np.ascontiguousarray(tensor.cpu().numpy()).tobytes()).hexdigest()


def _draw(pool: torch.Tensor, count: int, seed: int, purpose: str) -> torch.Tensor:
    return pool[torch.from_numpy(draws(seed, purpose).permutation(len(pool))[:count])].sort().values


def _in_chunks(images: torch.Tensor, change: Any) -> torch.Tensor:
    """Apply `change(chunk, indices)` piece by piece: temporary values stay in cache."""
    out = torch.empty_like(images)
    for which in _pieces(images):
        out[which] = change(images[which], torch.arange(which.start, which.stop))
    return out


def _pieces(images: torch.Tensor) -> Iterator[slice]:
    size = max(CHUNK_BYTES // (8 * max(images[0].numel() if len(images) else 1, 1)), 1)
    for start in range(0, len(images), size):
        yield slice(start, min(start + size, len(images)))

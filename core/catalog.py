"""The catalogue: how a file with a `Params` class and a `run` function becomes a public method.

Everything else (validation, OpenAPI, `GET /v1/methods`, CLI options, docs, registry-driven tests) follows from it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from core import architectures, pruning
from core.classifier import UNIT, Classifier, Preprocessing
from core.errors import ArchitectureUnknown, ClassMissing, ClassTooSmall, LabelsMissing, NotEnoughCleanData, OneClassOnly, TargetInvalid
from core.images import ImageSet
from core.run import Run
from core.triggers import Assets

if TYPE_CHECKING:
    from core.split import Split

# Fewer images of a class say nothing about its neighbourhoods, spectra or clusters.
LEAST_OF_A_CLASS = 10


class Kind(StrEnum):
    """What a method takes and gives."""

    INSPECT = "inspect"
    PURIFY = "purify"
    CLEANSE = "cleanse"
    TRAIN = "train"
    EVALUATE = "evaluate"
    ATTACK = "attack"


class Need(StrEnum):
    """What a method cannot do without."""

    MODEL = "model"
    CLEAN_IMAGES = "clean_images"
    CLEAN_LABELS = "clean_labels"
    BATCH_NORM = "batch_norm"
    SUSPECT_DATASET = "suspect_dataset"
    TEST_SET = "test_set"


class Strict(BaseModel):
    """A model from outside: unknown keys are errors, and `true` or `"0.4"` is no number.

    pydantic's own strict mode would refuse the valid JSON integer 4.0.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_lax_numbers(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, info in cls.model_fields.items():
                kinds = {info.annotation, *typing.get_args(info.annotation)}
                if kinds & {int, float} and not kinds & {str, bool} and isinstance(data.get(name), (bool, str)):
                    raise ValueError(f"{name} must be a number, not {type(data[name]).__name__}")
        return data


class Params(Strict):
    """Base of every method's parameters."""

    model_config = ConfigDict(frozen=True)


@dataclass(frozen=True)
class Inputs:
    """What a method works on.

    Attributes:
        model: the suspect classifier on the run's device.
        clean: trusted images on the run's device.
        suspect: the untrusted training set; on the run's device if it fits there.
        preprocessing: what models that are trained on the suspect set are given.
        watch: called with the model while it changes; reports BA and ASR on a fixed sample when they can be measured.
    """

    model: Classifier | None = None
    clean: ImageSet | None = None
    suspect: ImageSet | None = None
    preprocessing: Preprocessing = UNIT
    watch: Callable[[Classifier], None] = lambda model: None


@dataclass
class Outcome:
    """What a method hands back.

    Attributes:
        model: the purified or trained classifier.
        baseline: a classifier trained plainly on the same suspect set, to compare the trained one with.
        split: what is said of each image of the suspect set.
        embedding: (N, d), where the images of the suspect set lie; for the figure.
        findings: JSON: target, triggers, verdict, loss curves …
        triggers: recovered triggers worth a picture: {label: (mask (H, W), pattern (C, H, W))}.
        perturbations: what, added to images in [0, 1], leads to a class, worth a picture: {label: (C, H, W)}.
    """

    model: Classifier | None = None
    baseline: Classifier | None = None
    split: Split | None = None
    embedding: torch.Tensor | None = None
    findings: dict[str, Any] = field(default_factory=dict)
    triggers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    perturbations: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One public method.

    Attributes:
        name: the file's name; what `method` says in a request.
        kind: the folder's name.
        title, summary, paper: for people.
        needs: what a job must bring.
        params: the parameter class.
        run: `run(run, inputs, params) -> Outcome`; an attack's is `trigger(images, params, assets) -> images`.
        encoders: whether it also takes self-supervised encoders, whose backbone is handed to it as a classifier without a trained head.
        caution: what it was measured to cost or to leave, for whoever must choose; empty where nothing stands out.
    """

    name: str
    kind: Kind
    title: str
    summary: str
    paper: str
    needs: tuple[Need, ...]
    params: type[Params]
    run: Callable[..., Any]
    encoders: bool = False
    caution: str = ""

    def describe(self) -> dict[str, Any]:
        """Return the JSON form of the declaration."""
        schema = self.params.model_json_schema()
        defaults = {name: info.default for name, info in self.params.model_fields.items() if not info.is_required()}
        return {
            "name": self.name,
            "kind": self.kind.value,
            "title": self.title,
            "summary": self.summary,
            "paper": self.paper,
            "caution": self.caution,
            "needs": [need.value for need in self.needs],
            "params_schema": schema,
            "defaults": TypeAdapter(dict[str, Any]).dump_python(defaults, mode="json"),
        }


@dataclass(frozen=True)
class Attack(Method):
    """One attack; `run` puts the test-time trigger on uint8 images.

    Attributes:
        assets: `assets(params, shape) -> dict`: what the seed alone decides; `mask` (C, H, W) bool is always among it.
        fit: `fit(run, params, assets, train, chosen, surrogate) -> dict`: trains the trigger and returns all assets.
        fits_trigger: whether `fit` decides what test images look like, or only the poisoned training images.
        poison: `poison(images, params, assets, which) -> images` where the training images differ from the test images;
            `which` are the images' places in the recipe's list.
        disturb: the same for images that keep their labels; the parameters then have `cross_ratio`.
    """

    assets: Callable[[Any, Any], Assets] = lambda params, shape: {}
    fit: Callable[..., Assets] | None = None
    poison: Callable[..., torch.Tensor] | None = None
    disturb: Callable[..., torch.Tensor] | None = None
    fits_trigger: bool = True


_METHODS: dict[str, Method] = {}


def defense(
    *, title: str, paper: str, needs: tuple[Need, ...], encoders: bool = False, caution: str = ""
) -> Callable[[Callable[[Run, Inputs, Any], Outcome]], Any]:
    """Register `run(run, inputs, params)` of a file under `core/defenses/KIND/` as a method.

    The kind is the folder, the name is the file, the parameters are the class annotated on `params`.
    """

    def register(function: Callable[[Run, Inputs, Any], Outcome]) -> Callable[[Run, Inputs, Any], Outcome]:
        kind = Kind(function.__module__.split(".")[-2])
        _register(function, Method, kind=kind, title=title, paper=paper, needs=needs, encoders=encoders, caution=caution)
        return function

    return register


def attack(
    *,
    title: str,
    paper: str,
    assets: Callable[[Any, Any], Assets],
    fit: Callable[..., Assets] | None = None,
    poison: Callable[..., torch.Tensor] | None = None,
    disturb: Callable[..., torch.Tensor] | None = None,
    needs: tuple[Need, ...] = (),
    fits_trigger: bool = True,
) -> Callable[[Callable[[torch.Tensor, Any, Any], torch.Tensor]], Any]:
    """Register `trigger(images, params, assets)` of a file under `core/attacks/`: uint8 (N, C, H, W) in and out.

    See `Attack` for the parts. The parameters' class derives from `core.poisoning.AttackParams`.
    """

    def register(function: Callable[[torch.Tensor, Any, Any], torch.Tensor]) -> Callable[[torch.Tensor, Any, Any], torch.Tensor]:
        parts = {"assets": assets, "fit": fit, "poison": poison, "disturb": disturb, "fits_trigger": fits_trigger}
        _register(function, Attack, kind=Kind.ATTACK, title=title, paper=paper, needs=needs, **parts)
        return function

    return register


def methods() -> dict[str, Method]:
    """Return every method by name, defenses and attacks."""
    _discover("core.attacks")
    _discover("core.defenses")
    return dict(sorted(_METHODS.items()))


def defenses() -> dict[str, Method]:
    """Return the defenses by name."""
    return {name: method for name, method in methods().items() if not isinstance(method, Attack)}


def attacks() -> dict[str, Attack]:
    """Return the attacks by name. Files of defenses may call this while they are imported."""
    _discover("core.attacks")
    return {name: method for name, method in sorted(_METHODS.items()) if isinstance(method, Attack)}


def cleansers() -> dict[str, Method]:
    """Return the defenses that split a training set, by name. Files of defenses that train on a split may call this while they are imported."""
    _discover("core.defenses.cleanse")
    return {name: method for name, method in sorted(_METHODS.items()) if method.kind is Kind.CLEANSE}


def needs(method: Method, params: Params) -> set[Need]:
    """Return what a job must bring: what the method cannot do without, and the cleanser whose split it starts from."""
    split = getattr(params, "split", None)
    return {*method.needs, *(cleansers()[split.method].needs if split is not None else ())}


def require(method: Method, inputs: Inputs, params: Params) -> None:
    """Check that a method has what it needs, before anything starts.

    Raises `NotEnoughCleanData`, `LabelsMissing`, `OneClassOnly`, `ClassTooSmall`, `ClassMissing`, `LayerMissing`, `ArchitectureUnknown` or `TargetInvalid`.
    """
    model, clean, suspect = inputs.model, inputs.clean, inputs.suspect
    if suspect is not None and Need.SUSPECT_DATASET in method.needs:
        _check_suspect(method, suspect)
    classes = model.classes if model is not None else suspect.classes if suspect is not None else 0
    split = getattr(params, "split", None)
    if split is not None:
        require(cleansers()[split.method], inputs, split)
    name = getattr(params, "architecture", None)
    if suspect is not None and name is not None:
        described = architectures.named(name, classes=classes, channels=suspect.images.shape[1])
        if described.channels != suspect.images.shape[1]:
            raise ArchitectureUnknown(f"{name} takes {described.channels}-channel images, the data set has {suspect.images.shape[1]}", "Choose another.")
    if model is not None and Need.BATCH_NORM in method.needs:
        pruning.batch_norms(model)
    if clean is not None and Need.CLEAN_IMAGES in method.needs and len(clean) < classes:
        raise NotEnoughCleanData(
            f"{len(clean)} clean images for {classes} classes", "Give at least one image a class; the papers use 1 to 5 % of the training set."
        )
    if clean is not None and Need.CLEAN_LABELS in method.needs:
        if clean.labels is None:
            raise LabelsMissing(
                f"{method.name} needs the clean images' labels", "Upload a labelled data set, or choose a method that needs none, such as mcldef."
            )
        missing = sorted(set(range(classes)) - set(clean.labels.unique().tolist()))
        if missing:
            raise ClassMissing(
                f"{method.name} needs clean images of every class; there are none of {', '.join(map(str, missing[:20]))}", "Add images of these classes."
            )
    target = getattr(params, "target", None)
    if target is not None and classes and target >= classes:
        raise TargetInvalid(f"target {target} is not one of the {'model' if model is not None else 'data set'}'s {classes} classes", "Classes count from 0.")


def _check_suspect(method: Method, suspect: ImageSet) -> None:
    if suspect.labels is None:
        raise LabelsMissing(f"{method.name} needs the training set's labels", "Upload it as a folder a class, with a CSV of labels, or with a `labels` array.")
    check_classes(suspect.labels.bincount(minlength=suspect.classes).tolist(), suspect.class_names)


def check_classes(sizes: Sequence[int], class_names: Sequence[str]) -> None:
    """Check that a training set has enough classes, and each class enough images, for a label to be judged.

    Raises `OneClassOnly`, `ClassMissing` or `ClassTooSmall`.
    """
    names = [class_names[label] if class_names else str(label) for label in range(len(sizes))]
    filled = [label for label, size in enumerate(sizes) if size]
    if len(filled) < 2:
        raise OneClassOnly(
            f"all {sum(sizes)} images are of one class, {names[filled[0]]!r}" if filled else "the training set is empty",
            "A label can only be wrong beside others: upload the whole training set.",
        )
    empty = [names[label] for label, size in enumerate(sizes) if not size]
    if empty:
        raise ClassMissing(f"the training set has no image of {', '.join(empty[:20])}", "Add images of these classes, or leave the classes out.")
    small = [f"{names[label]} ({size})" for label, size in enumerate(sizes) if size < LEAST_OF_A_CLASS]
    if small:
        raise ClassTooSmall(
            f"classes with fewer than {LEAST_OF_A_CLASS} images cannot be judged: {', '.join(small[:20])}", "Add images, or leave these classes out."
        )


def union(found: Mapping[str, Method]) -> Any:
    """Return the pydantic type of "any of these methods with its parameters", told apart by `method`."""
    classes: list[Any] = [method.params for method in found.values()]
    return Annotated[functools.reduce(operator.or_, classes), Field(discriminator="method")] if len(classes) > 1 else classes[0]


def validate(found: Mapping[str, Method], value: Any) -> Params:
    """Return the parameters `value` describes; raises pydantic's `ValidationError`."""
    params: Params = TypeAdapter(union(found)).validate_python(value)
    return params


def _register(function: Callable[..., Any], entry: type[Method], **declared: Any) -> None:
    name = function.__module__.rsplit(".", 1)[-1]
    if name in _METHODS:
        raise ValueError(f"two methods are called {name!r}")
    params = typing.get_type_hints(function)["params"]
    summary = (inspect.getdoc(function) or "").split("\n", 1)[0]
    _METHODS[name] = entry(name=name, summary=summary, params=params, run=function, **declared)


@functools.cache
def _discover(package_name: str) -> None:
    package = importlib.import_module(package_name)
    for module in pkgutil.walk_packages(package.__path__, f"{package_name}."):
        importlib.import_module(module.name)

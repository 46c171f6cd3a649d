"""One job from its description to its report: load, measure, defend, measure, write."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core import catalog, evaluation, page, poisoning, report, split, training, verdict, weights
from core.catalog import Inputs, Kind, Need, Outcome
from core.classifier import Classifier, Preprocessing
from core.errors import BadDataset, BadJob, LayerMissing
from core.images import ImageSet
from core.inversion import stamp
from core.poisoning import AttackParams, Triggered
from core.probe import backbone_of, probe, with_backbone
from core.run import Run, without_nan
from core.split import Cleansing
from core.weights import Recognition

Number = Annotated[float, Field(strict=True)]
Channels = Annotated[list[Number], Field(min_length=1, max_length=16)]


class PreprocessingSpec(BaseModel):
    """How the model wants its images: `(pixel / 255 - mean) / std`, one number a channel."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    mean: Channels
    std: Annotated[list[Annotated[Number, Field(gt=0)]], Field(min_length=1, max_length=16)]


class EvaluationSpec(BaseModel):
    """What to measure with: a labelled clean test set and, if they are known, the attack or triggered images.

    Attributes:
        triggered: the folder of images with the trigger, labelled with their true classes.
        target: where the triggered images are meant to go; None is all-to-all, class y to y + 1.
    """

    model_config = ConfigDict(extra="forbid")
    test: str
    attack: dict[str, Any] | None = None
    triggered: str | None = None
    target: int | None = None


class JobSpec(BaseModel):
    """`job.json`: what to do; paths are relative to the job's folder.

    Attributes:
        defense: `{"method": …, …params}`.
        model: the safetensors file of the suspect model; None for a method that works on a training set alone.
        clean: the folder of the clean images; None for a method that needs none.
        suspect: the folder of the untrusted training set, for methods that cleanse it or train on it.
    """

    model_config = ConfigDict(extra="forbid")
    defense: dict[str, Any]
    model: str | None = None
    clean: str | None = None
    suspect: str | None = None
    evaluation: EvaluationSpec | None = None
    architecture: str | None = None
    preprocessing: PreprocessingSpec | None = None
    seed: int = 0
    device: str = "auto"
    checkpoint_seconds: float = 20.0


def execute(run: Run, spec: JobSpec, folder: Path) -> dict[str, Any]:
    """Carry out a job and return its report, which is also written to `out/report.json`.

    Raises `EngineError` for everything a user can do something about, `Cancelled` when told to stop.
    """
    started = time.monotonic()
    method, params, attack = _checked(spec)
    run.phase("loading")
    loaded = _load(run, spec, folder, purifying=method.kind is Kind.PURIFY)
    model, test = loaded.model, loaded.test
    triggered = _triggered(spec, folder, test, attack, loaded.classes) if test is not None else None
    inputs = Inputs(
        model=model, clean=loaded.clean.to(run.device) if loaded.clean is not None else None,
        suspect=loaded.suspect.placed(run.device) if loaded.suspect is not None else None, preprocessing=loaded.preprocessing,
        watch=_watcher(run, test, triggered) if loaded.encoder is None else lambda model: None,
    )  # fmt: skip
    if loaded.encoder is not None and not method.encoders:
        raise LayerMissing(
            f"{loaded.encoder.architecture.name} is an encoder: it has no classes that {method.name} could work on",
            "Use cbd, which purifies backbones without labels, or upload a classifier.",
        )
    catalog.require(method, inputs, params)
    labelled = None
    if loaded.encoder is not None and inputs.clean is not None:
        # Labels serve to measure an encoder, through a linear probe; no method sees them.
        labelled, inputs = inputs.clean if inputs.clean.labels is not None else None, replace(inputs, clean=replace(inputs.clean, labels=None))
        if labelled is not None and model is not None:
            run.phase("probing")
            probe(run, "probe before", model, labelled)
    trains = method.kind is Kind.TRAIN
    before = None
    if model is not None and test is not None and not trains:
        run.phase("evaluating_before")
        before = run.once("before", lambda: evaluation.evaluate(model, test, triggered))
        _announce(run, "before", before)

    run.phase("defending")
    outcome: Outcome = method.run(run, inputs, params)
    result = outcome.model
    if result is not None:
        training.check("the result", 0.0, result)
    # What a training is compared with is a plain training on the same images.
    suspect_model = outcome.baseline if trains else model

    if result is not None and labelled is not None:
        run.phase("probing")
        probe(run, "probe after", result, labelled)
    after = None
    if result is not None and test is not None:
        run.phase("evaluating_after")
        if trains and suspect_model is not None:
            before = run.once("before", lambda: evaluation.evaluate(suspect_model, test, triggered))
            _announce(run, "before", before)
        after = run.once("after", lambda: evaluation.evaluate(result, test, triggered))
        _announce(run, "after", after)

    run.phase("reporting")
    estimated = _estimate(model, outcome, inputs, attack) if model is not None else None
    kept_aside = None
    if result is not None and model is not None and loaded.aside is not None:
        aside = loaded.aside
        kept_aside = run.once("kept aside", lambda: _compare(model, result, aside))
    judged = None
    if method.kind in (Kind.PURIFY, Kind.TRAIN):
        # The test set may be what was kept aside; it is judged once.
        judged = verdict.judge(before, after, kept_aside, estimated["recovered_trigger_success"] if estimated else None)
        run.log(f"{judged['verdict']}: {'; '.join(judged['reasons'])}", **judged)
    lost = verdict.losers(before, after) if before and after else []
    for one in lost:
        run.warn(f"class {one['class']} fell from {one['before']['value']:.1%} to {one['after']['value']:.1%}", **one)
    pictures = {}
    if inputs.clean is not None:
        pictures = report.draw_triggers(run, outcome.triggers, inputs.clean) | report.draw_perturbations(run, outcome.perturbations, inputs.clean)
    recognition = loaded.recognition
    summary: dict[str, Any] = {
        "kind": method.kind.value,
        "method": method.name,
        "paper": method.paper,
        "params": params.model_dump(mode="json"),
        "seed": run.seed,
        "recognised": recognition.as_dict() if recognition is not None else None,
        "preprocessing": vars(loaded.preprocessing),
        "measured_on": loaded.measured_on,
        "class_names": list(next((data.class_names for data in (test, loaded.suspect, loaded.clean) if data is not None), ())),
        "attack": attack.model_dump(mode="json") if attack is not None else None,
        "before": before,
        "after": after,
        "der": evaluation.defense_effectiveness(before, after) if before and after else None,
        "estimated": estimated,
        "kept_aside": kept_aside,
        "verdict": judged,
        "classes_lost": lost,
        "cleansing": _cleansing(run, outcome, inputs, params),
        "findings": outcome.findings,
        "inputs": {
            "model_sha256": report.sha256(folder / spec.model) if spec.model is not None else None,
            "clean_images": len(loaded.clean) if loaded.clean is not None else 0,
            "suspect_images": len(loaded.suspect) if loaded.suspect is not None else 0,
        },
        "versions": report.versions(),
        "device": str(run.device),
    }
    if result is not None:
        kind = "rejected_model" if judged is not None and judged["verdict"] == "not_purified" else "cleaned_model"
        path = run.artifact("model.safetensors", kind=kind, media_type="application/octet-stream")
        whole = with_backbone(loaded.encoder, result) if loaded.encoder is not None else result
        weights.save(whole, path)
        summary["model"] = {"sha256": report.sha256(path), "bytes": path.stat().st_size, "description": whole.architecture.describe()}
    summary["seconds"] = round(time.monotonic() - started, 3)
    summary = without_nan(summary)
    report.write(run, summary)
    features = []
    if spec.evaluation is not None and test is not None and result is not None:
        shown = {"before": suspect_model, "after": result}
        features = page.plane(run, {title: one for title, one in shown.items() if one is not None}, test, triggered)
    page.write(run, summary, pictures, features, page.gallery(run, outcome, inputs) if outcome.split is not None else None)
    return summary


def _checked(spec: JobSpec) -> tuple[catalog.Method, catalog.Params, AttackParams | None]:
    """Return the method, its parameters and the declared attack; raises `BadJob` when they are wrong or an input is missing."""
    method = catalog.defenses().get(str(spec.defense.get("method")))
    if method is None:
        raise BadJob(f"there is no method {spec.defense.get('method')!r}", f"Methods: {', '.join(catalog.defenses())}.")
    try:
        params = catalog.validate({method.name: method}, spec.defense)
        attack = catalog.validate(catalog.attacks(), spec.evaluation.attack) if spec.evaluation and spec.evaluation.attack else None
    except ValidationError as error:
        raise BadJob(f"the parameters cannot be used: {error}", f"See docs/methods/{method.name}.md.") from error
    assert attack is None or isinstance(attack, AttackParams)
    for need, given, what in (
        (Need.MODEL, spec.model, "a model"),
        (Need.SUSPECT_DATASET, spec.suspect, "a training set to judge"),
        (Need.CLEAN_IMAGES, spec.clean, "clean images"),
        (Need.TEST_SET, spec.evaluation, "a labelled test set"),
    ):
        if given is None and need in catalog.needs(method, params):
            raise BadJob(f"{method.name} needs {what}", f"See docs/methods/{method.name}.md for what to give.")
    return method, params, attack


@dataclass(frozen=True)
class _Loaded:
    """A job's inputs.

    Attributes:
        encoder: what was uploaded, if that was a self-supervised encoder; `model` is its backbone with an untrained head then.
        aside: clean images that the method does not see. measured_on: what `test` is.
    """

    model: Classifier | None
    encoder: Classifier | None
    recognition: Recognition | None
    preprocessing: Preprocessing
    classes: int
    clean: ImageSet | None
    suspect: ImageSet | None
    aside: ImageSet | None
    test: ImageSet | None
    measured_on: str | None


def _load(run: Run, spec: JobSpec, folder: Path, *, purifying: bool) -> _Loaded:
    clean = ImageSet.load(folder / spec.clean) if spec.clean is not None else None
    suspect = ImageSet.load(folder / spec.suspect) if spec.suspect is not None else None
    test = ImageSet.load(folder / spec.evaluation.test) if spec.evaluation is not None else None
    preprocessing = Preprocessing(tuple(spec.preprocessing.mean), tuple(spec.preprocessing.std)) if spec.preprocessing else None
    model, encoder, recognition = None, None, None
    if spec.model is not None:
        images = next((data for data in (clean, test, suspect) if data is not None), None)
        tensors = weights.read(folder / spec.model)
        model, recognition = weights.identify(tensors, images, architecture=spec.architecture, preprocessing=preprocessing)
        run.log(f"recognised {recognition.architecture.name} with {recognition.preprocessing.name} preprocessing", **recognition.as_dict())
        if not recognition.decided:
            run.warn("the preprocessing is a close call; give `preprocessing` if you know it", scores=recognition.as_dict()["scores"][:3])
        model, preprocessing = model.to(run.device), recognition.preprocessing
        if model.architecture.embedding:
            assert images is not None
            encoder, model = model, backbone_of(model, max([2, *(data.classes for data in (clean, test, suspect) if data is not None)]))
    elif suspect is not None and preprocessing is None:
        channels = suspect.images.shape[1]
        preprocessing = Preprocessing((0.0,) * channels, (1.0,) * channels, "unit")
    if suspect is not None and preprocessing is not None and len(preprocessing.mean) != suspect.images.shape[1]:
        raise BadJob(f"preprocessing has {len(preprocessing.mean)} channels, the images {suspect.images.shape[1]}", "Give one mean and std a channel.")
    assert preprocessing is not None
    classes = model.classes if model is not None else suspect.classes if suspect is not None else 0
    clean, aside, test, measured_on = _datasets(run, clean, suspect, test, classes, purifying=purifying)
    if encoder is not None and (clean is None or clean.labels is None):
        # Nothing can be measured of an encoder without a probe, and there is no probe without labels.
        aside = test = measured_on = None
    return _Loaded(model, encoder, recognition, preprocessing, classes, clean, suspect, aside, test, measured_on)


def _datasets(
    run: Run, clean: ImageSet | None, suspect: ImageSet | None, test: ImageSet | None, classes: int, *, purifying: bool
) -> tuple[ImageSet | None, ImageSet | None, ImageSet | None, str | None]:
    """Return the clean images for the method, those kept aside from it, the labelled test images, and what the test images are.

    A tenth of the clean images is kept aside when a model is purified, or when a model is examined without a test set.
    """
    if clean is not None:
        if not len(clean):
            raise BadDataset("the clean data set is empty", "Upload at least a few images of every class.")
        _check_classes(clean, classes, "clean")
    if suspect is not None:
        _check_classes(suspect, classes, "suspect")
    if test is not None:
        if test.labels is None:
            raise BadDataset("the test set has no labels", "Upload it as a folder a class, or with a `labels` array.")
        _check_classes(test, classes, "test")
    given = {role: data for role, data in (("test", test), ("clean", clean), ("suspect", suspect)) if data is not None}
    sizes = {role: tuple(data.images.shape[1:]) for role, data in given.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{role} images are {size}" for role, size in sizes.items())
        raise BadDataset(f"{said} (C, H, W)", "Use images of one size and one number of channels.")
    if clean is not None and suspect is not None and clean.class_names != suspect.class_names and clean.class_names and suspect.class_names:
        raise BadDataset(
            f"the clean images' classes are {', '.join(clean.class_names[:5])} …, the suspect set's {', '.join(suspect.class_names[:5])} …",
            "Name the classes alike, and order them alike with classes.txt.",
        )
    aside = None
    if clean is not None and suspect is None and len(clean) >= 10 * classes and (purifying or (test is None and clean.labels is not None)):
        order = torch.randperm(len(clean), generator=run.generator("hold out"))
        cut = len(clean) // 10
        clean, aside = clean.subset(order[cut:]), clean.subset(order[:cut])
    if test is not None:
        return clean, aside, test, "test set"
    if aside is None or aside.labels is None:
        return clean, aside, None, None
    return clean, None, aside, "a tenth of the clean images, kept aside"


def _cleansing(run: Run, outcome: Outcome, inputs: Inputs, params: catalog.Params) -> dict[str, Any] | None:
    """Write the manifest of a split and return its numbers, as the verdict on the whole set leaves it."""
    if outcome.split is None or inputs.suspect is None:
        return None
    assert inputs.suspect.labels is not None
    given = inputs.suspect.labels.cpu()
    settled = outcome.split.cpu()
    if isinstance(params, Cleansing):
        settled = settled.settled(given, params)
    split.write_manifest(run, settled, inputs.suspect)
    found = split.summary(settled, given, inputs.suspect.classes)
    run.log(f"{found['verdict']}: {found['evidence']}", counts=found["counts"])
    if found["missed"]:
        run.warn(found["missed"])
    return found


def _compare(suspect: Classifier, purified: Classifier, aside: ImageSet) -> dict[str, Any]:
    """Return accuracy before and after on images kept aside, or without labels how often the purified model agrees with the suspect one."""
    was, now = (evaluation.predict(model, aside.images).cpu() for model in (suspect, purified))
    labels = was if aside.labels is None else aside.labels.cpu()
    before, after = (evaluation.rate(int((found == labels).sum()), len(labels)) for found in (was, now))
    return {"what": "agreement" if aside.labels is None else "accuracy", "before": before, "after": after}


def _triggered(spec: JobSpec, folder: Path, test: ImageSet, attack: AttackParams | None, classes: int) -> Triggered | None:
    """Return the triggered images: the user's own, or the test images with the declared trigger on them."""
    if spec.evaluation is None or (attack is None and spec.evaluation.triggered is None):
        return None
    if attack is not None:
        channels, height, width = test.images.shape[1:]
        return _counted(poisoning.triggered(test, poisoning.declared(attack, (channels, height, width), classes), classes))
    data, target = ImageSet.load(folder / str(spec.evaluation.triggered)), spec.evaluation.target
    if data.labels is None:
        raise BadDataset("the triggered images have no labels", "Label them with their true classes: images of the target class do not count for ASR.")
    _check_classes(data, classes, "triggered")
    if target is not None and target >= classes:
        raise BadJob(f"the attack's target {target} is not one of the model's {classes} classes", "Classes count from 0.")
    return _counted(poisoning.given(data, target, classes))


def _counted(triggered: Triggered) -> Triggered:
    if not len(triggered.images):
        raise BadDataset("every image for the trigger is of the target class already, so none shows whether it works", "Add test images of other classes.")
    return triggered


def _check_classes(data: ImageSet, classes: int, role: str) -> None:
    if data.labels is not None and data.classes != classes and (data.class_names or data.classes > classes):
        raise BadDataset(
            f"the {role} data set has {data.classes} classes, the model {classes}",
            "Upload images of exactly the model's classes; class folders in alphabetical order are labels 0, 1, ….",
        )


def _announce(run: Run, when: str, measured: dict[str, Any] | None) -> None:
    for name in evaluation.RATES:
        if measured and name in measured and measured[name]["value"] is not None:
            run.metric(name, measured[name]["value"], when=when, **{k: measured[name][k] for k in ("hits", "n", "low", "high")})


def _watcher(run: Run, test: ImageSet | None, triggered: Triggered | None) -> Any:
    """Return a function that reports BA and ASR on fixed samples of 500 test images while a method works."""
    if test is None:
        return lambda model: None
    sample = test.sample(500, run.generator("watch")).to(run.device)
    stamped = triggered.sample(500, run.generator("watch triggered")) if triggered is not None else None

    def watch(model: Classifier) -> None:
        measured = evaluation.evaluate(model, sample, stamped, mixed=True)
        for name in ("ba", "asr"):
            if name in measured:
                run.metric(name, measured[name]["value"], when="during", n=measured[name]["n"])

    return watch


def _estimate(model: Classifier, outcome: Outcome, inputs: Inputs, attack: AttackParams | None) -> dict[str, Any] | None:
    """Return how often each recovered trigger still works: an estimate, never mixed with a measured ASR.

    If the attack is known, also how well the mask of its target was recovered, as intersection over union.
    """
    if not outcome.triggers or inputs.clean is None:
        return None
    images = inputs.clean.images[:1000]
    truth = evaluation.predict(model, images, mixed=True)
    found: dict[str, Any] = {}
    for label, (mask, pattern) in outcome.triggers.items():
        # As for a measured ASR, images of the target class say nothing.
        stamped = stamp(images[truth != label].float().div(255), mask, pattern).clamp(0, 1).mul(255).round().to(torch.uint8)
        rates = {}
        for when, classifier in (("before", model), ("after", outcome.model)):
            if classifier is not None:
                predicted = evaluation.predict(classifier, stamped, mixed=True)
                rates[when] = evaluation.rate(int((predicted == label).sum()), len(predicted))
        found[str(label)] = rates
    estimate: dict[str, Any] = {"recovered_trigger_success": found}
    if attack is not None and attack.target in outcome.triggers:
        mask, pattern = outcome.triggers[attack.target]
        true = poisoning.declared(attack, (pattern.shape[0], pattern.shape[1], pattern.shape[2]), model.classes).assets["mask"].any(0)
        recovered = mask.cpu() > 0.5
        estimate["mask_iou"] = int((true & recovered).sum()) / max(int((true | recovered).sum()), 1)
    return estimate

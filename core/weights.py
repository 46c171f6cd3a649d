"""Safetensors in, Classifier out, and back: which architecture, which preprocessing, under the user's own names."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from core.architectures import Architecture, recognise
from core.architectures.network import only_shapes
from core.architectures.recognise import IGNORED, Shapes
from core.classifier import Classifier, Preprocessing
from core.errors import ArchitectureMismatch, ArchitectureUnknown, BadDataset, BadJob, BadWeights
from core.images import ImageSet, as_floats

# Constants seen in public training code, and images as they are; `centred` is (x - 0.5) / 0.5.
PREPROCESSINGS = tuple(
    Preprocessing(mean, std, name)
    for name, mean, std in (
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("cifar10-247", (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        ("unit", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ("centred", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ("gtsrb", (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
        ("tiny-imagenet", (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        ("bytes", (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    )
)
GREY = tuple(
    Preprocessing(mean, std, name)
    for name, mean, std in (
        ("unit", (0.0,), (1.0,)),
        ("centred", (0.5,), (0.5,)),
        ("mnist", (0.1307,), (0.3081,)),
        ("bytes", (0.0,), (1 / 255,)),
    )
)


@dataclass(frozen=True)
class Recognition:
    """What a checkpoint turned out to be, and how sure that is.

    Attributes:
        scores: BatchNorm-consistency scores of the candidates, best first: (architecture, preprocessing, score).
        decided: whether the evidence separates the first from the second.
    """

    architecture: Architecture
    preprocessing: Preprocessing
    scores: tuple[tuple[str, str, float], ...] = ()
    decided: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "architecture": self.architecture.name,
            "family": self.architecture.family,
            "options": self.architecture.options,
            "classes": self.architecture.classes,
            "channels": self.architecture.channels,
            "preprocessing": {
                "name": self.preprocessing.name,
                "mean": list(self.preprocessing.mean),
                "std": list(self.preprocessing.std),
            },
            "decided": self.decided,
            "scores": [{"architecture": a, "preprocessing": p, "score": s if math.isfinite(s) else None} for a, p, s in self.scores],
        }


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors intake wrote.

    Raises `BadWeights` when the file is not safetensors or a value is not finite.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadWeights(f"{path.name} is not a safetensors file: {error}", "Upload the checkpoint again.") from error
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise BadWeights(
            f"{len(broken)} tensors hold NaN or infinite values, the first is {broken[0]}",
            "The training that made this checkpoint diverged; upload one from before that.",
        )
    return tensors


def contradictions(shapes: Shapes, architecture: Architecture) -> None:
    """Compare names and shapes with those of the architecture; no weight is allocated.

    Raises `ArchitectureMismatch` when a tensor is missing, left over or of another shape.
    """
    with only_shapes():
        wanted = {name: tuple(value.shape) for name, value in architecture.build().state_dict().items()}
    given = {architecture.ours(name): tuple(shape) for name, shape in shapes.items() if not IGNORED.search(name)}
    problems = [f"{name} is missing" for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    problems += [f"{name} is left over" for name in given if name not in wanted]
    problems += [f"{name} has shape {list(given[name])} instead of {list(wanted[name])}" for name in wanted if name in given and given[name] != wanted[name]]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ArchitectureMismatch(
            f"the tensors look like {architecture.name} but contradict it: {'; '.join(problems[:8])}{more}",
            "Upload the state dict of an unmodified model of this architecture.",
        )


def build(tensors: dict[str, torch.Tensor], architecture: Architecture, preprocessing: Preprocessing) -> Classifier:
    """Rebuild the classifier.

    Raises `ArchitectureMismatch` when a tensor is missing, left over or of another shape.
    """
    contradictions({name: tuple(value.shape) for name, value in tensors.items()}, architecture)
    network = architecture.build()
    wanted = network.state_dict()
    given = {architecture.ours(name): value for name, value in tensors.items()}
    # Older checkpoints lack the counter; nothing in a forward pass reads it.
    # Filled in place: the network's own dictionary also says which version of each module it is.
    for name, value in wanted.items():
        wanted[name] = given.get(name, value).to(value.dtype)
    network.load_state_dict(wanted)
    return Classifier(network, architecture, preprocessing).eval()


def identify(
    tensors: dict[str, torch.Tensor],
    images: ImageSet | None,
    *,
    architecture: str | None = None,
    preprocessing: Preprocessing | None = None,
) -> tuple[Classifier, Recognition]:
    """Recognise the architecture and, unless given, find the preprocessing by BatchNorm consistency.

    Args:
        images: plausible inputs; up to 512 are used. Needed when anything has to be found out.
        architecture: the name to take when several fit.

    Raises:
        ArchitectureUnknown, ArchitectureMismatch: see `recognise` and `build`.
        BadDataset: when the images have other channels than the model.
        BadJob: when something is ambiguous and there are no images, or no BatchNorm, to decide it.
    """
    variants = recognise({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if architecture is not None:
        fitting = [variant for variant in variants if variant.name == architecture]
        if not fitting:
            raise ArchitectureUnknown(
                f"the checkpoint is {' or '.join(variant.name for variant in variants)}, not {architecture}",
                "Leave the architecture out, or name the right one.",
            )
        variants = fitting
    channels = variants[0].channels
    if images is not None and images.images.shape[1] != channels:
        raise BadDataset(
            f"the model takes {channels}-channel images, the data set has {images.images.shape[1]}",
            "Convert the images, or choose the data set the model was made for.",
        )
    usual = GREY if channels == 1 else PREPROCESSINGS
    candidates = (preprocessing,) if preprocessing is not None else usual if channels in (1, 3) else ()
    if preprocessing is not None and len(preprocessing.mean) != channels:
        raise BadJob(f"preprocessing has {len(preprocessing.mean)} channels, the model {channels}", "Give one mean and std a channel.")
    if len(variants) == 1 and len(candidates) == 1:
        return build(tensors, variants[0], candidates[0]), Recognition(variants[0], candidates[0])
    if images is None or not candidates:
        raise BadJob("the preprocessing cannot be found out without clean images", "Give `preprocessing` with mean and std.")
    return _most_consistent(tensors, images, variants, candidates)


def _most_consistent(
    tensors: dict[str, torch.Tensor],
    images: ImageSet,
    variants: list[Architecture],
    candidates: tuple[Preprocessing, ...],
) -> tuple[Classifier, Recognition]:
    floats = as_floats(images.images[:: max(len(images) // 512, 1)][:512].cpu())
    scored = []
    for variant in variants:
        for candidate in candidates:
            classifier = build(tensors, variant, candidate)
            score = batchnorm_consistency(classifier, floats)
            if score is None:
                raise BadJob(
                    f"{variant.name} has no BatchNorm statistics to tell its preprocessing from",
                    "Give `preprocessing` with mean and std.",
                )
            scored.append((score, classifier))
    scored.sort(key=lambda pair: pair[0])
    best, classifier = scored[0]
    # The runner-up must be clearly worse: 1.3 times with 512 images, 2 times with 64 (interpolated by count).
    margin = 2.0 if len(floats) < 256 else 1.3
    decided = len(scored) == 1 or scored[1][0] >= margin * best
    scores = tuple((c.architecture.name, c.preprocessing.name, score) for score, c in scored)
    return classifier, Recognition(classifier.architecture, classifier.preprocessing, scores, decided)


@torch.no_grad()
def batchnorm_consistency(classifier: Classifier, images: torch.Tensor) -> float | None:
    """Return how far the inputs of the BatchNorm layers are from their stored statistics; None without such layers.

    The mean over layers of `mean((mu - rm)^2 / (rv + eps)) + mean(log^2((v + eps) / (rv + eps)))`, channel by channel;
    lower is better. Images are floats in [0, 1], (N, C, H, W).
    """
    terms: list[torch.Tensor] = []

    def compare(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        spread = layer.running_var + layer.eps
        terms.append(((mean - layer.running_mean) ** 2 / spread).mean() + torch.log((variance + layer.eps) / spread).square().mean())

    layers = [m for m in classifier.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    hooks = [layer.register_forward_pre_hook(compare) for layer in layers]
    try:
        classifier.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    score = float(torch.stack(terms).mean()) if terms else None
    return float("inf") if score is not None and math.isnan(score) else score


def save(classifier: Classifier, path: Path) -> None:
    """Write the network under the names its checkpoint used, as contiguous safetensors with what is needed to use it."""
    state = {classifier.architecture.theirs(name): value.detach().cpu().contiguous() for name, value in classifier.network.state_dict().items()}
    used = {
        "architecture": classifier.architecture.name,
        "mean": classifier.preprocessing.mean,
        "std": classifier.preprocessing.std,
    }
    # One entry only: safetensors writes several in random order, and equal weights must be equal files.
    metadata = {"unpoison": json.dumps(used)}
    save_file(state, path, metadata=metadata)

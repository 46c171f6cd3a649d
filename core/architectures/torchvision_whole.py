"""Every other classifier of torchvision, whole: recognised by the exact names and shapes of its body's tensors.

`torchvision_index.json` holds one digest a model, so that recognising one builds none. Written by this file:
`python -m core.architectures.torchvision_whole`. Left out are models whose last layer is no linear one (SqueezeNet), and
RegNets, which cannot be laid out without allocating them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.architectures.network import Network, only_shapes
from core.architectures.recognise import Architecture, Shapes

FAMILY = "torchvision_whole"
INDEX = Path(__file__).with_name("torchvision_index.json")
# Files of this folder build these, with CIFAR forms and stages of their own.
ELSEWHERE = (
    "resnet18",
    "resnet34",
    "resnet50",
    "vgg",
    "densenet121",
    "densenet161",
    "mobilenet_v",
    "efficientnet_b0",
    "efficientnet_b3",
    "convnext_tiny",
    "vit_b_16",
)
SKIPPED = ("squeezenet", "regnet")


@functools.cache
def _index() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(INDEX.read_text())
    return found


NAMES = {entry["model"].replace("_", "-"): {"model": entry["model"]} for entry in _index().values()}


class Whole(Network):
    """A torchvision model as it is."""

    def __init__(self, whole: nn.Module, head_name: str) -> None:
        super().__init__()
        self.whole = whole
        self.head_name = f"whole.{head_name}"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes); the auxiliary ones of GoogLeNet and Inception are left out."""
        found = self.whole(images)
        return found if isinstance(found, torch.Tensor) else found.logits

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the last linear layer, (N, features)."""
        kept: list[torch.Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
        try:
            self.whole(images)
        finally:
            handle.remove()
        return kept[0]

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the last map of each resolution, in the order they are computed."""
        maps: dict[tuple[int, ...], torch.Tensor] = {}

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[2] > 1:
                maps[tuple(output.shape[2:])] = output

        handles = [module.register_forward_hook(keep) for module in self.whole.modules()]
        try:
            self.whole(images)
        finally:
            for handle in handles:
                handle.remove()
        return list(maps.values())


def digest(shapes: Shapes, head: str) -> str:
    """Return a digest of the names and shapes of the body's tensors; the head's sizes are the checkpoint's own."""
    body = sorted(
        (name, list(shape))
        for name, shape in shapes.items()
        if not name.startswith((f"{head}.", "AuxLogits.fc.", "aux")) and not name.endswith("num_batches_tracked")
    )
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:24]


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the network these shapes belong to, if they do."""
    found = []
    for head in sorted({entry["head"] for entry in _index().values()}):
        last = shapes.get(f"{head}.weight")
        entry = _index().get(digest(shapes, head)) if last is not None else None
        if entry is not None and entry["head"] == head and last is not None:
            found.append(describe(model=entry["model"], classes=last[0], channels=3))
    return found


def describe(*, model: str, classes: int, channels: int) -> Architecture:
    """Return the architecture of a torchvision model; all of them take three channels."""
    return Architecture(
        family=FAMILY,
        name=model.replace("_", "-"),
        options={"model": model, "classes": classes},
        classes=classes,
        channels=3,
        input_size=299 if model == "inception_v3" else 224,
        renames=(("", "whole."),),
    )


def build(options: dict[str, Any]) -> Whole:
    """Build the network that `variants` described."""
    entry = next(entry for entry in _index().values() if entry["model"] == options["model"])
    return Whole(_make(options["model"], options["classes"]), entry["head"])


def _make(model: str, classes: int) -> nn.Module:
    from torchvision import models

    quiet = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    whole: nn.Module = models.get_model(model, weights=None, num_classes=classes, **quiet)
    return whole


def index() -> dict[str, Any]:
    """Lay out every model without memory and return `{digest: {model, head}}`."""
    from torchvision import models

    found = {}
    for model in models.list_models(module=models):
        if model.startswith(ELSEWHERE + SKIPPED):
            continue
        with only_shapes():
            whole = _make(model, 10)
        head = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)][-1]
        found[digest({name: tuple(value.shape) for name, value in whole.state_dict().items()}, head)] = {"model": model, "head": head}
    return dict(sorted(found.items(), key=lambda pair: str(pair[1]["model"])))


if __name__ == "__main__":
    INDEX.write_text(json.dumps(index(), indent=1) + "\n")

"""Classifiers of timm, whole: recognised by the exact names and shapes of their body's tensors, or taken by name (`timm-…`).

Models that share all names and shapes (another activation, another padding) cannot be told apart from a checkpoint: all of them are
given as candidates, and the job's `architecture` decides. `timm_index.json` is written by this file, `python -m core.architectures.timm_whole`;
what another file of this folder recognises, and what does not end in one linear layer, is left out.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import nn

from core.architectures.network import only_shapes
from core.architectures.recognise import Architecture, Shapes, families
from core.architectures.torchvision_whole import Whole, digest

FAMILY = "timm_whole"
INDEX = Path(__file__).with_name("timm_index.json")


@functools.cache
def _index() -> dict[str, dict[str, Any]]:
    """Return by digest `{head, size, models}`."""
    found: dict[str, dict[str, Any]] = json.loads(INDEX.read_text())
    return found


NAMES = {f"timm-{model}": {"model": model} for entry in _index().values() for model in entry["models"]}


def variants(shapes: Shapes) -> list[Architecture]:
    """Return the networks these shapes belong to, if they do."""
    found = []
    for head in sorted({entry["head"] for entry in _index().values()} & {name.removesuffix(".weight") for name in shapes}):
        entry = _index().get(digest(shapes, head))
        if entry is not None and entry["head"] == head:
            found += [describe(model=model, classes=shapes[f"{head}.weight"][0], channels=3) for model in entry["models"]]
    return found


def describe(*, model: str, classes: int, channels: int) -> Architecture:
    """Return the architecture of a timm model; the index holds those of three channels."""
    entry = next(entry for entry in _index().values() if model in entry["models"])
    return Architecture(
        family=FAMILY,
        name=f"timm-{model}",
        options={"model": model, "classes": classes},
        classes=classes,
        channels=3,
        input_size=entry["size"],
        renames=(("", "whole."),),
    )


def build(options: dict[str, Any]) -> Whole:
    """Build the network that `variants` described."""
    entry = next(entry for entry in _index().values() if options["model"] in entry["models"])
    return Whole(_make(options["model"], options["classes"]), entry["head"])


def _make(model: str, classes: int) -> nn.Module:
    import timm

    whole: nn.Module = timm.create_model(model, pretrained=False, num_classes=classes)
    return whole


def index() -> dict[str, dict[str, Any]]:
    """Lay out every model without memory and return `{digest: {head, size, models}}`."""
    import timm

    others = [family for family in families() if family.FAMILY != FAMILY]
    found: dict[str, dict[str, Any]] = {}
    for model in timm.list_models():
        try:
            with only_shapes():
                whole: Any = _make(model, 10)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            # A few compute with their weights while they are made.
            continue
        if not hasattr(whole, "get_classifier"):
            continue
        heads = [name for name, module in whole.named_modules() if module is whole.get_classifier() and isinstance(module, nn.Linear)]
        shapes = {name: tuple(value.shape) for name, value in whole.state_dict().items()}
        if len(heads) != 1 or any(family.variants(shapes) for family in others):
            continue
        entry = found.setdefault(digest(shapes, heads[0]), {"head": heads[0], "size": whole.default_cfg["input_size"][-1], "models": []})
        entry["models"].append(model)
    return dict(sorted(found.items(), key=lambda pair: str(pair[1]["models"][0])))


if __name__ == "__main__":
    INDEX.write_text(json.dumps(index(), indent=0) + "\n")

"""Which architecture is it: from the names and shapes of a checkpoint's tensors alone, without torch."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.errors import ArchitectureUnknown

if TYPE_CHECKING:
    from core.architectures.network import Network

Shapes = Mapping[str, tuple[int, ...]]

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
# Tensors that trainers and profilers leave beside the weights; no forward pass reads them.
IGNORED = re.compile(r"(^|\.)(total_ops|total_params|n_averaged)$")


@dataclass(frozen=True)
class Architecture:
    """One architecture that fits a checkpoint.

    Attributes:
        family: the file of this folder that builds it.
        name: what people call it, e.g. `wrn-16-1`.
        options: what the family's `build` takes.
        classes, channels: the sizes of output and input.
        input_size: the usual height and width of its images, pixels.
        renames: pairs (theirs, ours) that translate a checkpoint's names.
        prefix: what was stripped from the front of every name.
        embedding: whether it is an encoder: `classes` is the length of its embedding then.
    """

    family: str
    name: str
    options: dict[str, Any]
    classes: int
    channels: int
    input_size: int
    renames: tuple[tuple[str, str], ...] = ()
    prefix: str = field(default="", compare=False)
    embedding: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the JSON form: what a model of this architecture is and takes."""
        return {
            "architecture": self.name,
            "candidates": [self.name],
            "family": self.family,
            "classes": self.classes,
            "embedding": self.embedding,
            "channels": self.channels,
            "input_size": self.input_size,
        }

    def build(self) -> Network:
        """Make the network with fresh weights."""
        network: Network = importlib.import_module(f"core.architectures.{self.family}").build(self.options)
        return network

    def ours(self, name: str) -> str:
        """Translate a checkpoint's tensor name (prefix included) into the network's."""
        return _replace(name.removeprefix(self.prefix), self.renames)

    def theirs(self, name: str) -> str:
        """Translate a network's tensor name into the checkpoint's, without the prefix."""
        return _replace(name, tuple((ours, theirs) for theirs, ours in self.renames))


def recognise(shapes: Shapes) -> list[Architecture]:
    """Return the architectures with these tensor names and shapes, likeliest first.

    Several come back only when parameters cannot tell them apart (a max-pool, say); a forward pass must decide.

    Raises `ArchitectureUnknown`, which names the first tensors, when there is none.
    """
    prefix = ""
    names = dict(shapes)
    while True:
        found = [variant for module in families() for variant in module.variants(names)]
        if found:
            return [Architecture(**{**vars(variant), "prefix": prefix}) for variant in found]
        step = next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None)
        if step is None:
            break
        prefix += step
        names = {name[len(step) :]: shape for name, shape in names.items()}
    listing = ", ".join(f"{name} {list(shape)}" for name, shape in list(names.items())[:20])
    raise ArchitectureUnknown(
        f"no architecture of the catalogue has these {len(names)} tensors: {listing or 'none at all'}",
        f"Known families: {', '.join(module.FAMILY for module in families())}. Upload the state dict of one of them, with its original tensor names.",
    )


def names() -> tuple[str, ...]:
    """Return the names that `named` knows."""
    return tuple(sorted(name for family in families() for name in family.NAMES))


def named(name: str, *, classes: int, channels: int = 3) -> Architecture:
    """Return an architecture by its name; raises `ArchitectureUnknown` with the names there are."""
    for family in families():
        if name in family.NAMES:
            return family.describe(**family.NAMES[name], classes=classes, channels=channels)
    near = difflib.get_close_matches(name, names(), 8, 0.5)
    rest = f"{len(names())} names are known, such as resnet18-cifar, wrn-16-1, vit-b-16, and timm's with `timm-` before them."
    raise ArchitectureUnknown(f"there is no architecture {name!r}", f"Close to it: {', '.join(near)}. {rest}" if near else rest[0].upper() + rest[1:])


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """Return how many numbered blocks follow `prefix` (`layer1.0.`, `layer1.1.` … → 2)."""
    numbers = {name[len(prefix) :].split(".", 1)[0] for name in shapes if name.startswith(prefix)}
    return sum(number.isdigit() for number in numbers)


@functools.cache
def families() -> list[Any]:
    """Return the modules of this folder that know a family of architectures."""
    import core.architectures as package

    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"core.architectures.{name}") for name in names if name not in ("network", "recognise")]
    return [module for module in modules if hasattr(module, "variants")]


def _replace(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name[len(old) :]
    return name

"""Checkpoints of running work as safetensors: nested state in, one file out, never a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace every tensor inside `value` by a reference into `tensors`; the rest becomes JSON.

    Dictionaries keep non-string keys (optimizers use integers). Raises `TypeError` for anything else.
    """
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        # A copy in the default layout: safetensors refuses views and shared storage.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name, "channels_last": _is_channels_last(value)}
    if isinstance(value, dict):
        return {"dict": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def unpack(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo `pack`."""
    if isinstance(tree, dict):
        if "tensor" in tree:
            tensor = tensors[tree["tensor"]]
            return tensor.to(memory_format=torch.channels_last) if tree["channels_last"] else tensor
        if "dict" in tree:
            return {unpack(key, tensors): unpack(item, tensors) for key, item in tree["dict"]}
        return [unpack(item, tensors) for item in tree["list"]]
    return tree


def write(path: Path, value: Any, *, header: dict[str, Any]) -> None:
    """Write `value` so that `path` is either the old file or the whole new one, even after a power cut."""
    tensors: dict[str, torch.Tensor] = {}
    tree = pack(value, tensors)
    partial = path.with_suffix(".partial")
    save_file(tensors or {"empty": torch.zeros(1)}, partial, metadata={"header": json.dumps(header), "tree": json.dumps(tree)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, Any], Any] | None:
    """Return `(header, value)`, or None when there is no readable checkpoint at `path`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (FileNotFoundError, SafetensorError):
        return None
    return json.loads(metadata["header"]), unpack(json.loads(metadata["tree"]), tensors)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)

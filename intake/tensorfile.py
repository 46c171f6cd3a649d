"""Safetensors, read strictly and written as a stream; bytes in, bytes out, no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from intake.refusal import Refusal, damaged, shown

CHUNK = 1 << 20
MAX_HEADER = 16 << 20
MAX_TENSORS = 50_000
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Tensor:
    """A tensor inside a file: where its storage lies and how it views it (strides and offset in items)."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage_start: int
    storage_items: int

    @property
    def items(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64)) if self.shape else 1

    @property
    def bytes(self) -> int:
        """Size when written densely."""
        return self.items * ITEM_BYTES[self.dtype]


def checked_shape(name: str, shape: Iterable[Any]) -> tuple[int, ...]:
    """Return the shape as a tuple of sane integers or refuse."""
    sizes = tuple(shape)
    items = 1
    if len(sizes) > 8:
        raise damaged(f"tensor {name} has {len(sizes)} dimensions")
    for size in sizes:
        if type(size) is not int or size < 0 or size > 1 << 40:
            raise damaged(f"tensor {name} has an impossible size: {shown(size)}")
        items *= size
    if items > 1 << 40:
        raise damaged(f"tensor {name} claims {items} elements")
    return sizes


def dense_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in items."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def checked(name: str, tensor: Tensor) -> Tensor:
    """Refuse a tensor that reaches outside its storage or repeats bytes instead of holding them."""
    if not NAME.fullmatch(name):
        raise Refusal("unsafe_file", f"tensor name {name!r} is not allowed", "Use names of letters, digits, dots, dashes and underscores.")
    if len(tensor.stride) != len(tensor.shape) or tensor.offset < 0:
        raise damaged(f"tensor {name} has strides that do not fit its shape")
    last = tensor.offset
    for size, step in zip(tensor.shape, tensor.stride, strict=True):
        if type(step) is not int or step < 0 or (step == 0 and size > 1):
            raise Refusal("unsafe_file", f"tensor {name} is an expanded view (stride {shown(step)})", "Save contiguous tensors: `{k: v.contiguous() for …}`.")
        last += (size - 1) * step if size else 0
    if tensor.items and last >= tensor.storage_items:
        raise damaged(f"tensor {name} reaches element {last} of a storage of {tensor.storage_items}")
    return tensor


def content(file: BinaryIO, tensor: Tensor) -> Iterator[bytes]:
    """Yield a tensor's elements in row-major order; memory stays near one chunk for contiguous tensors."""
    width = ITEM_BYTES[tensor.dtype]
    if tensor.items == 0:
        return
    real = [(size, step) for size, step in zip(tensor.shape, tensor.stride, strict=True) if size > 1]
    if [step for _, step in real] == list(dense_stride(tuple(size for size, _ in real))):
        file.seek(tensor.storage_start + tensor.offset * width)
        left = tensor.bytes
        while left:
            piece = file.read(min(CHUNK, left))
            if not piece:
                raise damaged("the file ends inside a tensor")
            left -= len(piece)
            yield piece
        return
    file.seek(tensor.storage_start)
    storage = np.frombuffer(file.read(tensor.storage_items * width), dtype=f"u{width}")
    if len(storage) != tensor.storage_items:
        raise damaged("the file ends inside a tensor")
    strides = tuple(step * width for step in tensor.stride)
    # `checked` has proved that the view stays inside the storage.
    view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides)
    yield np.ascontiguousarray(view).tobytes()


def write(source: BinaryIO, tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Write dense safetensors; return the names of the tensors that hold NaN or infinity."""
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, place + tensor.bytes]}
        place += tensor.bytes
    broken = []
    with path.open("wb") as out:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            finite = True
            for piece in content(source, tensor):
                finite = finite and _finite(piece, tensor.dtype)
                out.write(piece)
            if not finite:
                broken.append(name)
    return broken


def _finite(piece: bytes, dtype: str) -> bool:
    if dtype == "BF16":
        return not bool(((np.frombuffer(piece, dtype="<u2") & 0x7F80) == 0x7F80).any())
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}.get(dtype)
    return kind is None or bool(np.isfinite(np.frombuffer(piece, dtype=kind)).all())


def read(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; refuse holes, overlaps, duplicate names and trailing bytes."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise damaged(f"the safetensors header claims {length} bytes of a file of {size}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damaged(f"the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise damaged("the safetensors header is not an object")
    header.pop("__metadata__", None)
    tensors, ranges = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise damaged(f"tensor {name!r} has a malformed header entry")
        dtype, offsets = entry["dtype"], entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise Refusal("unsupported_format", f"tensor {name} has dtype {dtype!r}", f"Use one of {', '.join(ITEM_BYTES)}.")
        if not isinstance(entry["shape"], list) or not isinstance(offsets, list) or [type(o) for o in offsets] != [int, int]:
            raise damaged(f"tensor {name!r} has a malformed header entry")
        shape = checked_shape(name, entry["shape"])
        items = int(np.prod(shape, dtype=np.int64)) if shape else 1
        if offsets[1] - offsets[0] != items * ITEM_BYTES[dtype] or offsets[0] < 0:
            raise damaged(f"tensor {name} has {offsets} for {items} elements of {dtype}")
        ranges.append((offsets[0], offsets[1]))
        tensors[name] = checked(name, Tensor(dtype, shape, dense_stride(shape), 0, 8 + length + offsets[0], items))
    place = 0
    for start, end in sorted(ranges):
        if start != place:
            raise damaged("the tensors overlap or leave a hole")
        place = end
    if 8 + length + place != size:
        raise damaged(f"the file has {size} bytes, its header describes {8 + length + place}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found

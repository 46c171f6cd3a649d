"""Writes a CIFAR batch as Python's pickle, by its opcodes: nothing here imports the module that also reads them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def batch(content: dict[str, Any]) -> bytes:
    """Return a dictionary of text, bytes, integers, lists of them and (N, M) uint8 arrays as a pickle of protocol 3; keys become bytes, as in CIFAR.

    Raises `TypeError` for anything else.
    """
    items = b"".join(_value(key.encode()) + _value(value) for key, value in content.items())
    return b"\x80\x03}(" + items + b"u."


def _value(value: Any) -> bytes:
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, int):
        raw = int(value).to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8b" + struct.pack("<I", len(raw)) + raw
    if isinstance(value, list):
        return b"](" + b"".join(_value(one) for one in value) + b"e"
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return _array(value)
    raise TypeError(f"a batch holds no {type(value).__name__}")


def _array(array: np.ndarray) -> bytes:
    """Return numpy's own recipe: an empty array, then its state (version, shape, dtype, order, bytes)."""
    empty = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + _value(0) + b"\x85" + _value(b"b") + b"\x87R"
    kind = b"cnumpy\ndtype\n" + _value("u1") + b"\x89\x88\x87R(" + _value(3) + _value("|") + b"NNN" + _value(-1) + _value(-1) + _value(0) + b"tb"
    shape = b"(" + b"".join(_value(size) for size in array.shape) + b"t"
    return empty + b"(" + _value(1) + shape + kind + b"\x89" + _value(array.tobytes()) + b"tb"

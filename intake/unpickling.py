"""An abstract interpreter over pickle opcodes: it never imports and never calls.

Globals are names. A short list of tensor builders makes records of where bytes lie; harmless bookkeeping (numpy
scalars, argument namespaces) becomes an inert stub; every other global refuses the file by name.
"""

from __future__ import annotations

import os
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from intake.refusal import Refusal, damaged

MAX_OPCODES = 5_000_000
MAX_LINE = 1 << 20
MAX_DEPTH = 200


@dataclass(frozen=True)
class Global:
    """A name the pickle wanted to import."""

    name: str


@dataclass(frozen=True)
class Storage:
    """`key` of `items` elements of `dtype`, whose bytes lie elsewhere in the file."""

    dtype: str
    key: str
    items: int


@dataclass(frozen=True)
class TensorRecord:
    """A view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]


@dataclass
class Inert:
    """An object of a harmless kind, of which nothing is kept but the kind."""

    kind: str


@dataclass
class Recorded(Inert):
    """An object of a harmless kind with what the pickle would have given it; for readers that know what to do with it."""

    arguments: tuple[Any, ...]
    state: Any = None


STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in (
        ("Double", "F64"), ("Float", "F32"), ("Half", "F16"), ("BFloat16", "BF16"), ("Long", "I64"),
        ("Int", "I32"), ("Short", "I16"), ("Char", "I8"), ("Byte", "U8"), ("Bool", "BOOL"),
    )
}  # fmt: skip
MAPPINGS = {"collections.OrderedDict", "builtins.dict", "__builtin__.dict"}
TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
PARAMETERS = {"torch._utils._rebuild_parameter"}
INERT = {
    "argparse.Namespace", "collections.Counter", "collections.defaultdict", "builtins.set", "builtins.frozenset",
    "builtins.complex", "builtins.slice", "__builtin__.set", "torch.Size", "torch.device", "_codecs.encode",
    "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.ndarray",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy._core.numeric._frombuffer",
    "pathlib.PosixPath", "pathlib.Path", "pathlib.PurePosixPath", "pathlib.WindowsPath", "datetime.datetime",
    "datetime.timedelta", "omegaconf.dictconfig.DictConfig", "torch.float32", "torch.float16", "torch.bfloat16",
    "torch.float64", "torch.int64", "torch.int32", "torch.uint8", "torch.bool", "torch.strided",
}  # fmt: skip


class _Bounded:
    """What pickletools reads: never more than is there. A buffered file reserves what it is asked for before it looks."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        position = file.tell()
        self._end = file.seek(0, os.SEEK_END)
        file.seek(position)
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(max(min(count, self._end - self._file.tell()), 0))

    def readline(self) -> bytes:
        return self._file.readline(MAX_LINE)


class Interpreter:
    """Runs one pickle to an abstract value.

    Args:
        storage: called with each persistent id; returns the storage it names.
        record: keep the arguments and state of harmless objects (`Recorded`) instead of dropping them.
    """

    def __init__(self, storage: Callable[[Any], Storage], *, record: bool = False) -> None:
        self._storage = storage
        self._record = record
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, file: BinaryIO) -> Any:
        """Interpret up to STOP; the file is left after it.

        Raises `Refusal` for anything that is not plain data and tensors.
        """
        try:
            for count, (opcode, argument, position) in enumerate(pickletools.genops(cast(BinaryIO, _Bounded(file)))):
                if count > MAX_OPCODES:
                    raise Refusal("unsafe_file", f"the pickle has more than {MAX_OPCODES} opcodes", "Save only the state dict.")
                if opcode.name == "STOP":
                    if len(self._stack) != 1:
                        raise damaged("the pickle ends with a stack of several values")
                    return self._stack.pop()
                self._step(opcode.name, argument, position or 0)
        except (ValueError, IndexError, KeyError, TypeError, UnicodeDecodeError, OverflowError, AttributeError) as error:
            raise damaged(f"the pickle cannot be read: {type(error).__name__}: {error}") from error
        raise damaged("the pickle has no end")

    def _step(self, name: str, argument: Any, position: int) -> None:
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE"):
            stack.append({} if name == "EMPTY_DICT" else () if name == "EMPTY_TUPLE" else [])
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            items = self._to_mark()
            stack.append(tuple(items) if name == "TUPLE" else _pairs(items) if name == "DICT" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = [stack.pop() for _ in range(count)]
            stack.append(tuple(reversed(items)))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._to_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
            elif not isinstance(stack[-1], Inert):
                raise damaged(f"the pickle appends to a {type(stack[-1]).__name__} at byte {position}")
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._to_mark()
            if isinstance(stack[-1], dict):
                stack[-1].update(_pairs(items))
            elif not isinstance(stack[-1], Inert):
                raise damaged(f"the pickle sets items of a {type(stack[-1]).__name__} at byte {position}")
        elif name == "GLOBAL":
            stack.append(self._global(".".join(argument.split(" ", 1)), position))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._global(f"{module}.{attribute}", position))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._reduce(function, arguments, position))
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                stack.pop()
            stack.pop()
            stack.append(Inert(stack.pop().name))
        elif name == "BUILD":
            # The state of an OrderedDict (`_metadata`) or of a stub says nothing about weights.
            state = stack.pop()
            if isinstance(stack[-1], Recorded):
                stack[-1].state = state
            elif not isinstance(stack[-1], (dict, Inert)):
                raise Refusal("unsafe_file", f"the pickle sets attributes of a {type(stack[-1]).__name__} at byte {position}", _ADVICE)
        else:
            raise Refusal("unsafe_file", f"the pickle uses opcode {name} at byte {position}", _ADVICE)

    def _to_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _global(self, name: str, position: int) -> Global:
        if name in STORAGES or name in MAPPINGS or name in TENSORS or name in PARAMETERS or name in INERT or name.startswith("numpy.dtypes."):
            return Global(name)
        if name.startswith(("torch.nn.", "torchvision.", "timm.", "__main__.")):
            raise Refusal(
                "unsafe_file",
                f"the file is a pickled model object: it wants to import {name} (byte {position})",
                "Upload the weights alone: torch.save(model.state_dict(), path).",
            )
        raise Refusal("unsafe_file", f"the pickle wants to import {name} (byte {position}); nothing was run", _ADVICE)

    def _reduce(self, function: Any, arguments: Any, position: int) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Refusal("unsafe_file", f"the pickle calls a {type(function).__name__} at byte {position}", _ADVICE)
        if function.name in MAPPINGS:
            return _pairs([part for pair in arguments[0] for part in pair]) if arguments else {}
        if function.name in TENSORS:
            storage, offset, shape, stride = arguments[:4]
            if not isinstance(storage, Storage) or type(offset) is not int or not isinstance(shape, tuple) or not isinstance(stride, tuple):
                raise damaged(f"a tensor at byte {position} is not built from a storage")
            return TensorRecord(storage, offset, shape, stride)
        if function.name in PARAMETERS:
            if not isinstance(arguments[0], TensorRecord):
                raise damaged(f"a parameter at byte {position} is not built from a tensor")
            return arguments[0]
        if function.name in STORAGES:
            raise Refusal("unsafe_file", f"the pickle makes a storage without bytes at byte {position}", _ADVICE)
        if not self._record:
            return Inert(function.name)
        if function.name == "_codecs.encode" and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] in ("latin1", "latin-1"):
            # How Python 3 writes bytes for Python 2.
            return arguments[0].encode("latin-1")
        return Recorded(function.name, arguments)


_ADVICE = "Save only tensors: torch.save(model.state_dict(), path), or safetensors."
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip


def _pairs(items: list[Any]) -> dict[Any, Any]:
    found = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Keys other than these never lead to weights; hashing a stranger's tuple of colliding integers is slow.
        if isinstance(key, (str, bytes, int)) and not (isinstance(key, int) and key.bit_length() > 64):
            found[key] = value
    return found

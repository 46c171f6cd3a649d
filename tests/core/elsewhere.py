"""A device that this machine need not have: numbers on the CPU behind tensors that say they are elsewhere, and CUDA's rules of what may meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# A device type that torch can name without a driver, whose backward passes run in the calling thread.
DEVICE = torch.device("lazy", 0)
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
# What takes its indices from the CPU wherever the values are.
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on `DEVICE`; its numbers are in `here`."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Elsewhere:
        shown: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        shown.here = here
        return shown

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copy: torch.Tensor = Elsewhere(self.here.clone())
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.here.tolist()

    def new_tensor(self, data: Any) -> torch.Tensor:  # type: ignore[override]
        # As `torch.tensor` below.
        return self.here.new_tensor(data).to(DEVICE)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return carry_out(function, args, kwargs or {})


def carry_out(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do one operation, some of whose tensors are elsewhere or whose result shall be; raises `RuntimeError` where CUDA would."""
    leaves = tree_leaves((args, kwargs))
    tensors = [one for one in leaves if isinstance(one, torch.Tensor)]
    to = kwargs.get("device")
    away = any(isinstance(one, Elsewhere) for one in tensors) if to is None else torch.device(to).type == DEVICE.type
    if function not in COPIES and any(isinstance(one, Elsewhere) for one in tensors):
        free = [one for one in tree_leaves(args[1]) if isinstance(args[0], Elsewhere)] if function in INDEXED else []
        if any(not isinstance(one, Elsewhere) and one.dim() > 0 and not any(one is index for index in free) for one in tensors):
            raise RuntimeError(f"{function} of tensors on more than one device: {[(tuple(one.shape), str(one.device)) for one in tensors]}")
        if function._schema.is_mutable and not isinstance(args[0], (Elsewhere, list)):
            raise RuntimeError(f"{function} would write into the CPU from elsewhere")
    if away and any(isinstance(one, torch.Generator) for one in leaves):
        raise RuntimeError(f"{function} elsewhere with a generator of the CPU")
    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    given, named = tree_map(_here, (args, kwargs))
    found = function(*given, **named)
    if function is aten._local_scalar_dense.default:
        return found
    # What is changed in place stays the object that it was.
    changed = [
        one
        for argument, value in zip(function._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for one in tree_leaves(value)
    ]
    known = {id(_here(one)): one for one in changed}

    def back(one: Any) -> Any:
        if not isinstance(one, torch.Tensor) or id(one) in known:
            return known.get(id(one), one)
        # A copy is one, also where the CPU would hand out what it was given.
        copied = one.clone() if any(one is other for other in given) else one
        return Elsewhere(copied) if away else copied

    return tree_map(back, found)


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Elsewhere) else value


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if any(isinstance(one, Elsewhere) for one in tree_leaves((args, kwargs))) or (to is not None and torch.device(to).type == DEVICE.type):
            return carry_out(function, args, kwargs)
        return function(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Give this process a second device. It knows no mixed precision, and a numpy array is not made of its tensors, as of CUDA's."""
    make, autocast = torch.tensor, torch.autocast

    def tensor(data: Any, *, device: Any = None, **how: Any) -> torch.Tensor:
        # torch makes and copies it inside, where no mode sees it.
        return make(data, **how) if device is None else make(data, **how).to(device)

    def casting(device_type: str, **how: Any) -> Any:
        return autocast("cpu" if device_type == DEVICE.type else device_type, **how)

    with mock.patch.object(torch, "tensor", tensor), mock.patch.object(torch, "autocast", casting), _Pretending():
        yield DEVICE

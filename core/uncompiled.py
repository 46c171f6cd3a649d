"""Torch without its compiler, which nothing here uses."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

COMPILER = "torch._dynamo"


class Absent(types.ModuleType):
    """Stands in for the compiler: answers what optimizers ask of it, and makes way for the real one when it is asked for anything else."""

    @staticmethod
    def disable(function: Any, recursive: bool = True, *, wrapping: bool = True) -> Any:
        """Return the function: what is never compiled needs no keeping from it."""
        return function

    @staticmethod
    def graph_break(*_: Any) -> None:
        """Do nothing, as outside of a compilation."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)


def leave_out_compiler() -> None:
    """Spare this process the import of torch's compiler, unless it is loaded already.

    The first optimizer imports it, only to tell it not to compile the optimizer: seconds and a hundred megabytes a job (docs/adr/0016).
    """
    sys.modules.setdefault(COMPILER, Absent(COMPILER))

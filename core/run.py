"""Run: progress, cancel, checkpoints, randomness and device; all that a method sees of the world."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from core import snapshot
from core.errors import Cancelled

Emit = Callable[[dict[str, Any]], None]


def repeatable() -> None:
    """Have torch choose the same operations in the same order each time, in this process.

    It would also fill every new tensor, so that nothing can depend on what memory held before; all of ours are written before they are
    read, and the filling is a tenth of a training step on a CPU.
    """
    # The same as `use_deterministic_algorithms(True, warn_only=True)`, which imports torch's compiler to tell it, too.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Stage:
    """One resumable loop: iterate it for the step numbers; `stop()` ends it after the current step."""

    def __init__(self, run: Run, name: str, total: int, state: dict[str, Any]) -> None:
        self._run = run
        self._stopped = False
        self.name = name
        self.total = total
        self.state = state

    def stop(self) -> None:
        """End the stage after this step, as finished."""
        self._stopped = True

    def __iter__(self) -> Iterator[int]:
        run = self._run
        path = run.checkpoint_path(self.name)
        done, finished = run.restore(path, self.state)
        run.progress(self.name, done, self.total)
        saved_at = time.monotonic()
        while done < self.total and not finished:
            yield done
            done += 1
            finished = self._stopped or done == self.total
            due = time.monotonic() - saved_at >= run.checkpoint_seconds
            if finished or due or run.stopping:
                run.save(path, self.state, step=done, finished=finished)
                saved_at = time.monotonic()
            run.progress(self.name, done, self.total, force=finished)
            run.check_cancelled()


class Run:
    """The world as a method sees it.

    Args:
        seed: every random draw of the job derives from it.
        device: where tensors live; `auto` takes CUDA when there is one.
        folder: where checkpoints, files and figures go; None keeps nothing (a resumed run starts over).
        emit: receives each event as a JSON-ready dictionary.
        config: a digest of everything that decides the result; checkpoints of another config are ignored.
        checkpoint_seconds: the least time between two checkpoints inside a stage.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        device: str = "auto",
        folder: Path | None = None,
        emit: Emit = lambda event: None,
        config: str = "",
        checkpoint_seconds: float = 20.0,
    ) -> None:
        self.seed = seed
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.emit: Emit = lambda event: emit(without_nan(event))
        self.config = config
        self.checkpoint_seconds = checkpoint_seconds
        self.stopping = False
        self._folder = folder
        self._names: set[str] = set()
        self._scope: tuple[str, ...] = ()
        self._progress_at = 0.0
        if folder is not None:
            for name in ("checkpoints", "out"):
                (folder / name).mkdir(parents=True, exist_ok=True)

    # -- talking ------------------------------------------------------------------------------------------------

    def phase(self, name: str) -> None:
        """Say which part of the job begins."""
        self.emit({"type": "phase", "message": name, "data": {"phase": name}})

    def log(self, message: str, **data: Any) -> None:
        """Say something a user may want to read."""
        self.emit({"type": "log", "message": message, "data": data})

    def warn(self, message: str, **data: Any) -> None:
        """Say something a user should not overlook."""
        self.emit({"type": "warning", "message": message, "data": data})

    def metric(self, name: str, value: float, **data: Any) -> None:
        """Report one measured number; rates are in [0, 1]."""
        self.emit({"type": "metric", "message": name, "data": {"name": name, "value": value, **data}})

    def progress(self, phase: str, step: int, total: int, *, force: bool = False) -> None:
        """Report how far a stage is, at most once a second."""
        now = time.monotonic()
        if force or step == 0 or now - self._progress_at >= 1.0:
            self._progress_at = now
            self.emit({"type": "progress", "message": phase, "data": {"phase": phase, "step": step, "total": total}})

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put `name` before the names of all stages, steps and generators made inside, for what is done more than once."""
        outer, self._scope = self._scope, (*self._scope, name)
        try:
            yield
        finally:
            self._scope = outer

    # -- randomness ---------------------------------------------------------------------------------------------

    def generator(self, *scope: object) -> torch.Generator:
        """Return a CPU generator whose stream depends on the seed and `scope` alone."""
        digest = hashlib.sha256(repr((self.seed, *self._scope, *scope)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    # -- steps that survive a crash -----------------------------------------------------------------------------

    def stage(self, name: str, *, total: int, **state: Any) -> Stage:
        """Return a loop over `total` steps that reports progress, can be cancelled and resumes where it was.

        `state` names what a step changes: modules, optimizers, generators, tensors (restored in place) and
        dictionaries of JSON values. After the loop they hold the final state, whether it ran now or before a crash.
        Stage names must be unique within a job.
        """
        name = " ".join((*self._scope, name))
        if name in self._names:
            raise ValueError(f"two stages are named {name!r}")
        self._names.add(name)
        return Stage(self, name, total, state)

    def once(self, name: str, function: Callable[[], Any]) -> Any:
        """Return `function()` (JSON), computed once even if the job is interrupted afterwards."""
        path = self.checkpoint_path(" ".join((*self._scope, name)))
        found = snapshot.read(path) if path is not None else None
        if found is not None and found[0]["config"] == self.config:
            return found[1]
        self.check_cancelled()
        value = json.loads(json.dumps(function()))
        if path is not None:
            snapshot.write(path, value, header={"config": self.config})
            self.emit({"type": "checkpoint", "message": path.name, "data": {"name": path.name}})
        return value

    def check_cancelled(self) -> None:
        """Raise `Cancelled` if the job was asked to stop."""
        if self.stopping:
            raise Cancelled

    def checkpoint_path(self, name: str) -> Path | None:
        """Return where the checkpoint called `name` lives, or None when nothing is kept."""
        if self._folder is None:
            return None
        safe = "".join(letter if letter.isalnum() else "-" for letter in name)
        return self._folder / "checkpoints" / f"{safe}.safetensors"

    def save(self, path: Path | None, state: dict[str, Any], *, step: int, finished: bool) -> None:
        """Write the state of a stage and tell the supervisor."""
        if path is None:
            return
        random: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        value = {"random": random, "state": {name: _state_of(item) for name, item in state.items()}}
        snapshot.write(path, value, header={"config": self.config, "step": step, "finished": finished})
        self.emit({"type": "checkpoint", "message": path.name, "data": {"name": path.name, "step": step}})

    def restore(self, path: Path | None, state: dict[str, Any]) -> tuple[int, bool]:
        """Load a stage's checkpoint into `state`; return `(steps done, finished)`."""
        found = snapshot.read(path) if path is not None else None
        if found is None or found[0]["config"] != self.config:
            return 0, False
        header, value = found
        for name, item in state.items():
            _load_state(item, value["state"][name])
        torch.set_rng_state(value["random"]["cpu"])
        if "cuda" in value["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(value["random"]["cuda"], self.device)
        return header["step"], header["finished"]

    # -- files out ----------------------------------------------------------------------------------------------

    def output(self, name: str) -> Path:
        """Return the path of a result file called `name`.

        Raises `ValueError` when the run keeps no files.
        """
        if self._folder is None:
            raise ValueError("this run has no folder to write results into")
        return self._folder / "out" / name

    def artifact(self, name: str, *, kind: str, media_type: str) -> Path:
        """Return where to write the result file `name` and announce it to the user."""
        path = self.output(name)
        self.emit({"type": "artifact", "message": name, "data": {"name": name, "kind": kind, "media_type": media_type}})
        return path


def without_nan(value: Any) -> Any:
    """Return a JSON value with None for every number that JSON does not know: NaN and the infinities, of a model whose numbers overflow."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _state_of(item: Any) -> Any:
    if isinstance(item, torch.Generator):
        return item.get_state()
    if isinstance(item, (torch.Tensor, dict)):
        return item
    return item.state_dict()


def _load_state(item: Any, value: Any) -> None:
    if isinstance(item, torch.Generator):
        item.set_state(value)
    elif isinstance(item, torch.Tensor):
        with torch.no_grad():
            item.copy_(value)
    elif isinstance(item, dict):
        item.clear()
        item.update(value)
    else:
        item.load_state_dict(value)

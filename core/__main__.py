"""`python -m core FOLDER`: carry out FOLDER/job.json; JSON events on stdout, logs on stderr.

Exit codes: 0 done, 3 the engine says why not (an `error` event), 4 stopped on request, 1 anything else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

EXIT_FAILED, EXIT_CANCELLED = 3, 4


def main(arguments: list[str]) -> int:
    """Run one job; see the module's docstring for the exit code."""
    parser = argparse.ArgumentParser(prog="python -m core", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds job.json and what it names; out/ and checkpoints/ are written here")
    parser.add_argument("--watch-stdin", action="store_true", help="exit when stdin ends: the supervisor has died")
    options = parser.parse_args(arguments)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    # Whatever a library prints must not be taken for an event.
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    if options.watch_stdin:
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    return _run(options.folder, emit)


def _run(folder: Path, emit: Any) -> int:
    # Deterministic cuBLAS must be asked for before CUDA starts. Threads that wait must sleep: on a machine with other
    # work, spinning ones make every operation wait for a time slice.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    import torch
    from pydantic import ValidationError

    from core import job
    from core.allocator import keep_freed_memory
    from core.errors import BadJob, Cancelled, EngineError
    from core.run import Run, repeatable
    from core.uncompiled import leave_out_compiler

    keep_freed_memory()
    leave_out_compiler()
    repeatable()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        spec = job.JobSpec.model_validate_json((folder / "job.json").read_text())
    except (OSError, ValidationError) as error:
        bad = BadJob(f"job.json cannot be used: {error}", "Give a job.json as core/job.py describes it.")
        emit({"type": "error", "message": bad.message, "data": bad.as_dict()})
        return EXIT_FAILED
    try:
        decisive = spec.model_dump(mode="json", exclude={"checkpoint_seconds"})
        config = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        torch.manual_seed(spec.seed)
        run = Run(
            seed=spec.seed,
            device=spec.device,
            folder=folder,
            emit=emit,
            config=config,
            checkpoint_seconds=spec.checkpoint_seconds,
        )
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(run, "stopping", True))
        report = job.execute(run, spec, folder)
    except Cancelled:
        return EXIT_CANCELLED
    except EngineError as error:
        emit({"type": "error", "message": error.message, "data": error.as_dict()})
        return EXIT_FAILED
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _out_of_memory(emit, error)
    except RuntimeError as error:
        # torch reports a failed CPU allocation as a plain RuntimeError.
        if "alloc" not in str(error).lower() and "out of memory" not in str(error).lower():
            raise
        return _out_of_memory(emit, error)
    emit({"type": "result", "message": "done", "data": report})
    return 0


def _out_of_memory(emit: Any, error: BaseException) -> int:
    from core.errors import OutOfMemory

    told = OutOfMemory(f"memory ran out: {error}", "Use a smaller batch_size, or a larger worker.")
    emit({"type": "error", "message": told.message, "data": told.as_dict()})
    return EXIT_FAILED


def _exit_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

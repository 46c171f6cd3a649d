"""The engine as a child process: its own session, a thin environment, its lines in a queue."""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

from store.settings import Settings

GRACE_SECONDS = 2.0
COMMAND = [sys.executable, "-m", "worker.engine"]
# Nothing else of the worker's environment, which holds the keys to every floor, reaches the engine.
KEPT = ("PATH", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VIRTUAL_ENV", "TMPDIR")


class Child:
    """A running engine.

    Attributes:
        lines: what it writes to stdout, in bytes with their line ends; None after the last.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Start it on a job's folder.

        Raises `OSError` when the machine has no process or memory for it.
        """
        command = shlex.split(settings.engine_command) or COMMAND
        limits = {"memory": settings.engine_memory_bytes, "file_bytes": settings.engine_file_bytes}
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        root = str(Path(__file__).resolve().parent.parent)
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",
            "UNPOISON_ENGINE_LIMITS": json.dumps(limits),
        }
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        self._errors: list[bytes] = []
        # It ends when its stdin does, so that it cannot outlive this process.
        self._process = subprocess.Popen(
            [*command, str(folder)], env=environment, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()
        self._overhearing = threading.Thread(target=self._overhear, daemon=True)
        self._overhearing.start()

    def wait(self) -> int:
        """Wait until it has ended; return its exit code."""
        return self._process.wait()

    def last_words(self) -> str:
        """Return the last line of its stderr, at most 300 characters; to be asked once it has ended."""
        # Its end is seen before the thread has read all it said; a child of its own may hold stderr open for longer.
        self._overhearing.join(GRACE_SECONDS)
        return b"".join(self._errors[-20:]).decode(errors="replace").strip().rsplit("\n", 1)[-1][:300]

    def kill(self) -> None:
        """End its whole process group: politely, then not."""
        for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _overhear(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line[:2000])
            del self._errors[:-50]

"""What the engine said before it ended is heard, however late."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.settings import Settings
from worker.child import Child


@pytest.mark.parametrize(
    ("engine", "code", "words"),
    [
        ("echo first >&2; echo last >&2; exit 1", 1, "last"),
        # Said after the exit code can be read: by a process that the engine has left behind.
        ("(sleep 0.5; echo late >&2) >/dev/null & exit 1", 1, "late"),
        # One that holds stderr open for good is not waited for.
        ("echo last >&2; sleep 60 >/dev/null & exit 0", 0, "last"),
        ("exit 0", 0, ""),
    ],
)
def test_last_words(engine: str, code: int, words: str, tmp_path: Path) -> None:
    child = Child(Settings(engine_command=f"sh -c '{engine}' engine"), tmp_path)
    while child.lines.get(timeout=30) is not None:
        pass
    assert (child.wait(), child.last_words()) == (code, words)
    child.kill()

"""`python -m worker.engine FOLDER`: the engine in its fence; it dies with whoever started it."""

from __future__ import annotations

import json
import os
import sys

from intake import fence


def main(arguments: list[str]) -> int:
    """Fence this process, then become `python -m core`."""
    limits = json.loads(os.environ.pop("UNPOISON_ENGINE_LIMITS", "{}"))
    fence.confine_engine(memory=limits.get("memory"), file_bytes=limits.get("file_bytes"))
    from core.__main__ import main as run

    return run([*arguments, "--watch-stdin"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

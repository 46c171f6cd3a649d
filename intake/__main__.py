"""`python -m intake {model|dataset} FILE FOLDER`: read a stranger's file in a fence; one JSON line of verdict on stdout.

Exit codes: 0 taken in, 3 refused, anything else: the reader failed and the file counts as refused.
`python -m intake rewrite FILE FOLDER` writes a data set again without what the folder's manifest drops, in the same fence.
`python -m intake self-test` proves the fence instead and prints which layers hold and what they deny.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# More threads than one would keep memory high and some kernels from making a namespace.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from intake import checkpoint, dataset, fence, rewrite
from intake.refusal import Refusal

EXIT_REFUSED = 3
MEMORY = 2 << 30
CPU_SECONDS = 1800


def main(arguments: list[str]) -> int:
    """Read one file; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m intake", description=__doc__)
    parser.add_argument("purpose", choices=("model", "dataset", "rewrite", "self-test"))
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("folder", type=Path, nargs="?", help="where the safetensors and JSON go")
    parser.add_argument("--resize", type=int, help="make every picture of a data set a square of this many pixels")
    options = parser.parse_args(arguments)
    if options.purpose == "self-test":
        return _self_test()
    if options.file is None or options.folder is None:
        parser.error("FILE and FOLDER are needed")
    _warm_up()
    layers = fence.confine(
        readable=[options.file.absolute(), *_libraries()],
        writable=[options.folder.absolute()],
        memory=MEMORY,
        cpu_seconds=CPU_SECONDS,
        file_bytes=16 << 30,
    )
    verdict, code = _examine(options.purpose, options.file, options.folder, options.resize)
    print(json.dumps({**verdict, "fence": layers}))
    return code


def _examine(purpose: str, file: Path, folder: Path, side: int | None) -> tuple[dict[str, Any], int]:
    readers = {"model": checkpoint.take_in, "dataset": lambda file, folder: dataset.take_in(file, folder, side), "rewrite": rewrite.rewrite}
    try:
        return {"verdict": "ready", "description": readers[purpose](file, folder)}, 0
    except Refusal as refusal:
        return {"verdict": "rejected", "code": refusal.code, "message": refusal.message, "advice": refusal.advice}, EXIT_REFUSED
    except (MemoryError, RecursionError) as error:
        message = f"reading the file ran into a limit ({type(error).__name__})"
        return {"verdict": "rejected", "code": "unsafe_file", "message": message, "advice": "Upload a smaller or simpler file."}, EXIT_REFUSED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # The file may be as good as any: whoever asked tries again when there is room.
        return {"verdict": "rejected", "code": "storage_full", "message": "there is no space left to read the file into", "advice": ""}, EXIT_REFUSED


def _self_test() -> int:
    with tempfile.NamedTemporaryFile() as secret, tempfile.TemporaryDirectory() as folder:
        layers = fence.confine(readable=_libraries(), writable=[Path(folder)], memory=MEMORY, cpu_seconds=60, file_bytes=1 << 20)
        print(json.dumps({"layers": layers, "denies": fence.self_test(Path(secret.name))}), flush=True)
        # Landlock now keeps the temporary file from being removed here; the parent removes its folder.
        os._exit(0)


def _libraries() -> list[Path]:
    """Where modules that are imported late (codecs, image plugins) lie."""
    return [Path(sys.prefix), Path(sys.base_prefix), Path("/usr/lib"), Path("/lib")]


def _warm_up() -> None:
    """Import what Pillow and numpy would import on first use, before files are out of reach."""
    from PIL import Image

    Image.init()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

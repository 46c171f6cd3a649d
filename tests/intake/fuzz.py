"""Coverage-guided fuzzing of the readers, without their fence: `make fuzz`, or `python -m tests.intake.fuzz model|dataset --seconds 600`.

It starts from the corpus of hostile files and from what earlier runs found, here (`.cache/fuzz`) and elsewhere (`tests/intake/seeds`, which
`--keep` writes). Anything but a refusal or a success is a
finding, and so is an input that takes five seconds or a gigabyte; libFuzzer then writes it to the folder and the exit code is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import atheris
import numpy as np
from PIL import Image

with atheris.instrument_imports(include=["intake"]):
    from intake import checkpoint, dataset
    from intake.refusal import Refusal

from tests.intake import corpus
from tests.stack import ROOT

READERS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"model": checkpoint.take_in, "dataset": dataset.take_in}
LARGEST = 1 << 16


def main() -> None:
    """Fuzz one reader until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=sorted(READERS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--keep", action="store_true", help="fuzz nothing; pack what was found")
    options = parser.parse_args()
    kept = ROOT / ".cache" / "fuzz" / options.reader
    kept.mkdir(parents=True, exist_ok=True)
    known = {hashlib.sha256(seed).hexdigest(): seed for seed in seeds(options.reader)}
    if options.keep:
        keep(kept, known, corpus.SEEDS / f"{options.reader}.zip")
        return
    for seed in corpus.fuzzed(options.reader):
        known[hashlib.sha256(seed).hexdigest()] = seed
    for name, seed in known.items():
        (kept / name).write_bytes(seed)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    read, file, out = READERS[options.reader], folder / "file", folder / "out"

    def once(data: bytes) -> None:
        file.write_bytes(data)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with contextlib.suppress(Refusal):
            read(file, out)

    limits = [f"-max_total_time={options.seconds}", "-timeout=5", "-rss_limit_mb=1024", f"-max_len={LARGEST}", f"-artifact_prefix={kept.parent}/found-"]
    atheris.Setup([sys.argv[0], *limits, str(kept)], once)
    atheris.Fuzz()


def keep(found: Path, known: Iterable[str], out: Path) -> None:
    """Pack the files of a folder, but for those that are made anew each time; the same files make the same bytes."""
    out.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as packed:
        for path in sorted(found.iterdir()):
            name = hashlib.sha256(path.read_bytes()).hexdigest()
            if name not in known:
                packed.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_LZMA)


def seeds(reader: str) -> Iterator[bytes]:
    """Yield the small files of the corpus, and what such files look like when nothing is wrong with them."""
    yield from valid(reader)
    kinds = (corpus.checkpoints, corpus.safetensors) if reader == "model" else (corpus.datasets,)
    for kind in kinds:
        for _, data in kind("/nonexistent") if kind is not corpus.safetensors else kind():  # type: ignore[call-arg]
            if len(data) <= LARGEST:
                yield data


def valid(reader: str) -> Iterator[bytes]:
    """Yield small files that are taken in."""
    if reader == "model":
        plain = corpus.state(corpus.tensor())
        yield corpus.torch_zip(plain)
        yield corpus.legacy(plain)
        return
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")
    files = {"a/1.png": picture.getvalue(), "b/2.png": picture.getvalue()}
    for mode in ("w", "w:gz"):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as target:  # type: ignore[call-overload]
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                target.addfile(entry, io.BytesIO(data))
        yield out.getvalue()
    listed = {"1.png": picture.getvalue(), "labels.csv": b"file,label\n1.png,cat\n"}
    for members in (files, listed):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        yield out.getvalue()
    out = io.BytesIO()
    np.savez(out, images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.arange(2))
    yield out.getvalue()


if __name__ == "__main__":
    main()

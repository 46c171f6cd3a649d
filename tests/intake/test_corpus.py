"""The corpus of hostile files: the parsers alone refuse every one, and the fence alone holds without a parser."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intake import checkpoint, dataset, door
from intake.refusal import Refusal
from tests.intake import corpus
from tests.stack import ROOT


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the parsers said of every file, without a fence."""
    folder = tmp_path_factory.mktemp("corpus")
    inside = folder / "inside"
    inside.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.intake.corpus", str(inside), str(folder / "marker")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Nothing was run, and nothing was written elsewhere.
    assert sorted(path.name for path in folder.iterdir()) == ["inside"]
    assert sorted(path.name for path in inside.iterdir()) == ["file", "out"]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_hostile_file_is_refused_with_a_sentence(found: list[dict[str, Any]]) -> None:
    files, memory = found[:-1], found[-1]
    kinds = Counter(one["kind"] for one in files)
    assert kinds["model"] - len(list(corpus.safetensors())) >= 80 and len(list(corpus.safetensors())) >= 20 and kinds["dataset"] >= 40
    assert len({(one["kind"], one["name"]) for one in files}) == len(files)
    for one in files:
        assert one["code"] in ("unsafe_file", "unsupported_format", "damaged_file", "dataset_invalid", "too_large"), one
        assert 10 < len(one["message"]) <= 500 and one["advice"] and " at 0x" not in one["message"], one
        assert one["message"].isprintable() and one["seconds"] < 5, one
    assert memory["peak_megabytes"] < 300


def test_a_gadget_is_refused_by_its_name(found: list[dict[str, Any]]) -> None:
    for gadget in corpus.GADGETS:
        (one,) = [one for one in found[:-1] if one["name"] == f"calls {gadget}"]
        assert one["code"] == "unsafe_file" and gadget.replace(" ", ".") in one["message"], one


@pytest.mark.parametrize("reader", ["model", "dataset"])
def test_what_fuzzing_found_still_ends_well(reader: str, tmp_path: Path) -> None:
    read: Callable[[Path, Path], object] = {"model": checkpoint.take_in, "dataset": dataset.take_in}[reader]
    taken, refused = 0, 0
    for number, data in enumerate(corpus.fuzzed(reader)):
        out = tmp_path / str(number)
        out.mkdir()
        (tmp_path / "file").write_bytes(data)
        # Anything but a refusal fails the test.
        try:
            read(tmp_path / "file", out)
        except Refusal:
            refused += 1
        else:
            taken += 1
    assert refused > 100 and taken


UNSAFE = """
import os, pickle, sys
from pathlib import Path
from intake import fence
folder, marker = Path(sys.argv[1]), sys.argv[2]
layers = fence.confine(readable=[Path(sys.prefix), Path(sys.base_prefix), Path("/usr/lib"), Path("/lib")], writable=[folder], memory=2 << 30, cpu_seconds=60, file_bytes=1 << 20)
reached = []
for name, payload in (
    ("mkdir", (os.mkdir, (marker,))), ("shell", (os.system, (f"touch {marker}",))), ("read", (open, ("/etc/passwd",))), ("write", (open, (marker, "w"))),
    ("kill", (os.kill, (os.getppid(), 0))), ("fork", (os.execv, ("/bin/true", ["true"]))), ("socket", (__import__("socket").socket, ())),
):
    class Payload:
        def __reduce__(self): return payload
    try:
        found = pickle.loads(pickle.dumps(Payload()))
    except OSError:
        continue
    if not (name == "shell" and found != 0):
        reached.append(name)
print(",".join(layers), "|", ",".join(reached))
"""


def test_the_fence_holds_with_an_unsafe_loader_inside(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    command = [sys.executable, "-c", UNSAFE, str(tmp_path / "folder"), str(tmp_path / "marker")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    layers, reached = done.stdout.strip().split("|")
    assert "seccomp" in layers
    # Without Landlock (old kernels) files are out of reach of the parser only, and the service says so.
    assert set(filter(None, reached.strip().split(","))) <= (set() if "landlock" in layers else {"mkdir", "read", "write"})
    assert not (tmp_path / "marker").exists() or "landlock" not in layers


def test_the_fenced_child_gives_the_same_answers(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    files = [("model", *one) for one in list(corpus.checkpoints(str(marker)))[::16]] + [("dataset", *one) for one in list(corpus.datasets(str(marker)))[::8]]
    for number, (kind, name, data) in enumerate(files):
        folder = tmp_path / str(number)
        folder.mkdir()
        (tmp_path / "file").write_bytes(data)
        verdict = door.examine(kind, tmp_path / "file", folder)
        assert not verdict.ready and verdict.fence and verdict.message and verdict.advice, (name, verdict)
    assert not marker.exists()

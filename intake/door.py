"""Starts the fenced reader as a child and trusts nothing it says but one well-formed line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What became of a file.

    Attributes:
        ready: whether it was taken in; then `description` says what it is and the folder holds safetensors and JSON.
        code, message, advice: why not. `storage_full` says nothing about the file: it was not read for lack of space.
        fence: the layers that held.
    """

    ready: bool
    description: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    message: str = ""
    advice: str = ""
    fence: tuple[str, ...] = ()


def examine(purpose: str, file: Path, folder: Path, *, resize: int | None = None, timeout_seconds: float = 1800.0) -> Verdict:
    """Read `file` as a `model` or `dataset` into `folder`, in a child without secrets; wait for the verdict.

    With `rewrite`, write the data set again as the folder's manifest says; see `intake.rewrite`.
    """
    command = [sys.executable, "-m", "intake", purpose, str(file), str(folder), *(["--resize", str(resize)] if resize is not None else [])]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_seconds, check=False, env=_environment(), stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Verdict(False, code="unsafe_file", message=f"reading took longer than {timeout_seconds:g} s", advice="Upload a smaller file.")
    try:
        said = json.loads(done.stdout)
    except ValueError:
        return _broken(done.returncode)
    if done.returncode == 0 and said.get("verdict") == "ready":
        return Verdict(True, description=said["description"], fence=tuple(said["fence"]))
    if said.get("verdict") == "rejected":
        return Verdict(False, code=said["code"], message=said["message"], advice=said["advice"], fence=tuple(said["fence"]))
    return _broken(done.returncode)


def self_test() -> dict[str, Any]:
    """Prove the fence in a child: `{layers: […], denies: {what: bool}}`, empty when the child failed."""
    command = [sys.executable, "-m", "intake", "self-test"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=_environment(), stdin=subprocess.DEVNULL)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"layers": [], "denies": {}}
    return found


def _broken(code: int) -> Verdict:
    return Verdict(
        False,
        code="unsafe_file",
        message=f"the reader ended without a verdict (exit code {code}), so the file was not fully examined",
        advice="Save the weights or images again with a current tool; if it happens again, report it.",
    )


def _environment() -> dict[str, str]:
    """The child sees no secret: only what Python needs to start."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV") if name in os.environ}
    root = str(Path(__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent"}

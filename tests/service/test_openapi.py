"""schemathesis on the running service: the document is true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stack import ROOT, Stack


def schemathesis(stack: Stack, *more: str) -> None:
    # What the document's boundaries mean to the HTTP layer is the same on both stacks; the larger one gets what reaches its floors.
    laptop = stack.environment["UNPOISON_QUEUE_URL"].startswith("filesystem:")
    examples, phases = ("10", "examples,coverage,fuzzing,stateful") if laptop else ("5", "examples,fuzzing,stateful")
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{stack.url}/openapi.json", "--header", f"Authorization: Bearer {stack.make_key()}",
        "--max-examples", os.environ.get("UNPOISON_EXAMPLES", examples), "--phases", phases, "--seed", "7", "--no-color", "--request-timeout", "30", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.timeout(600)
def test_schemathesis_finds_nothing(service: Stack) -> None:
    # Revoking keys comes apart: schemathesis revokes the key it works with, and is a stranger from then on.
    schemathesis(service, "--exclude-operation-id", "revoke_key")
    schemathesis(service, "--include-path-regex", "keys")


def test_the_committed_document_is_current(api: Stack) -> None:
    import json

    import httpx

    assert json.loads((ROOT / "docs" / "openapi.json").read_text()) == httpx.get(f"{api.url}/openapi.json").json()

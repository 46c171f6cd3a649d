"""schemathesis on the running service: the document is true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stack import ROOT, Stack


@pytest.mark.timeout(600)
def test_schemathesis_finds_nothing(api: Stack, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{api.url}/openapi.json", "--header", f"Authorization: Bearer {api.make_key()}",
        "--max-examples", os.environ.get("UNPOISON_EXAMPLES", "15"), "--seed", "7", "--exclude-checks", "positive_data_acceptance",
        "--exclude-path-regex", "(stream|readyz)$", "--no-color", "--request-timeout", "30",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_committed_document_is_current(api: Stack) -> None:
    import json

    import httpx

    assert json.loads((ROOT / "docs" / "openapi.json").read_text()) == httpx.get(f"{api.url}/openapi.json").json()

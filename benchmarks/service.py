"""A service to measure: the one in UNPOISON_URL, or one started here in its own folder and stopped at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client import Client
from client.errors import UnpoisonError


@contextmanager
def running(folder: Path, *, seconds: float = 120.0, **settings: str) -> Iterator[Client]:
    """Yield a client of a running service.

    Raises `RuntimeError`, with the service's own words, when one started here does not come up.
    """
    if "UNPOISON_URL" in os.environ:
        with Client() as client:
            yield client
        return
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "UNPOISON_DATA_FOLDER": str(folder), "UNPOISON_PORT": "0", **settings}
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "service", "serve"], env=environment, stderr=log, stdout=log, start_new_session=True)
    try:
        client = _connect(folder, server, seconds)
        with client:
            yield client
    finally:
        server.terminate()
        try:
            server.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _connect(folder: Path, server: subprocess.Popen[bytes], seconds: float) -> Client:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None:
            break
        try:
            profile = json.loads((folder / "client.json").read_text())
            client = Client(profile["url"], profile["api_key"], retries=0)
            client.methods.list()
            client.close()
            return Client(profile["url"], profile["api_key"])
        except (OSError, ValueError, UnpoisonError):
            time.sleep(0.2)
    raise RuntimeError(f"the service did not start; its log says:\n{(folder / 'serve.log').read_text()[-2000:]}")

"""What each floor sees from here."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import torch

from intake import door
from service.__main__ import say
from store import queue
from store.database import Database
from store.errors import StoreError
from store.objects import Objects
from store.settings import Settings


def examine(settings: Settings) -> dict[str, Any]:
    """Return what database, queue, objects, sandbox and hardware look like; problems start with "down"."""
    found: dict[str, Any] = {"data_folder": str(settings.data_folder), "free_bytes": shutil.disk_usage(settings.data_folder).free}
    database = Database(settings.database)
    try:
        current, newest = database.revision()
        state = "ok" if current == newest else f"down: migration {current} instead of {newest}; run `python -m service migrate`"
        found["database"] = {"url": database.url.render_as_string(hide_password=True), "state": state}
    except Exception as error:
        found["database"] = {"url": database.url.render_as_string(hide_password=True), "state": f"down: {error}"}
    try:
        Objects(settings.objects).exists("0" * 64)
        found["objects"] = {"url": settings.objects, "state": "ok"}
    except StoreError as error:
        found["objects"] = {"url": settings.objects, "state": f"down: {error.detail}"}
    try:
        with queue.app(settings.queue).connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=2)
        found["queue"] = {"url": settings.queue.split("@")[-1], "state": "ok"}
    except Exception as error:
        found["queue"] = {"url": settings.queue.split("@")[-1], "state": f"down: {error}"}
    proved = door.self_test()
    missing = [name for name in ("rlimits", "no_new_privs", "landlock", "seccomp") if name not in proved["layers"]]
    state = "ok" if not missing else f"partial: this machine lacks {', '.join(missing)}"
    found["sandbox"] = {**proved, "state": state}
    found["hardware"] = {
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch": torch.__version__,
    }
    return found


def main(settings: Settings, *, as_json: bool) -> int:
    """Print the examination; exit code 1 when something is down."""
    found = examine(settings)
    if as_json:
        print(json.dumps(found))  # noqa: T201
    else:
        for name, value in found.items():
            say(f"{name:12} " + (", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)))
    states = [value["state"] for value in found.values() if isinstance(value, dict) and "state" in value]
    return 1 if any(state.startswith("down") for state in states) else 0

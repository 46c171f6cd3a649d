"""Whoever works on a job keeps it, however long a step takes; whoever was asked to stop hears of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from store.objects import Objects
from store.settings import Settings
from tests.conftest import Case, StackMaker, upload
from worker import supervisor, sweeper


class SlowObjects(Objects):
    """A store that takes two leases for every file."""

    seconds = 6.0

    def put(self, *arguments: Any, **named: Any) -> tuple[str, int]:
        time.sleep(self.seconds)
        return super().put(*arguments, **named)


def test_a_slow_store_does_not_cost_the_job(make_stack: StackMaker, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = f"sh {Path(__file__).parent / 'instant_engine.sh'} {tmp_path / 'runs'}"
    stack = make_stack("laptop", UNPOISON_LEASE_SECONDS="3", UNPOISON_BEAT_SECONDS="0.2", UNPOISON_ENGINE_COMMAND=engine)
    stack.start_api()
    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    ended = threading.Event()

    def sweep() -> None:
        while not ended.wait(0.2):
            sweeper.sweep(settings, stack.database, lambda job_id: True)

    with stack.client() as client:
        job = upload(client, case).job(client)
        sweeping = threading.Thread(target=sweep)
        sweeping.start()
        try:
            outcome = supervisor.run(settings, stack.database, SlowObjects(stack.environment["UNPOISON_OBJECTS_URL"]), job["id"], owner="test")
        finally:
            ended.set()
            sweeping.join()
        found = client.jobs.get(job["id"])
    assert (outcome, found["status"], found["attempt"]) == ("succeeded", "succeeded", 1)

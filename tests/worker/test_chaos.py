"""Kills at random moments: every job still succeeds, once, with the weights of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from client.flows import TERMINAL
from store import jobs
from tests.conftest import Case, StackMaker, upload
from tests.stack import Stack, kill

KILLS = int(os.environ.get("UNPOISON_KILLS", "20"))


def weights(client: Any, job: dict[str, Any]) -> str:
    return next(item["sha256"] for item in client.jobs.artifacts(job["id"]) if item["kind"] == "cleaned_model")


def descendants(stack: Stack) -> int:
    return len(stack.engines())


def ends(client: Any, job: dict[str, Any], stack: Stack, seconds: float = 120) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while True:
        try:
            found: dict[str, Any] = client.jobs.get(job["id"])
            if found["status"] in TERMINAL:
                return found
        except Exception:
            pass
        assert time.monotonic() < until, stack.logs()
        time.sleep(0.1)


@pytest.mark.timeout(600)
def test_killed_at_random_moments(make_stack: StackMaker, case: Case) -> None:
    stack = make_stack("laptop", UNPOISON_MAX_CRASHES="10")
    api, worker = stack.start_api(), stack.start_worker()
    draw = random.Random(7)
    with stack.client(retries=8) as client:
        uploaded = upload(client, case)
        started = time.monotonic()
        undisturbed = ends(client, uploaded.job(client), stack)
        length = time.monotonic() - started
        assert undisturbed["status"] == "succeeded", (undisturbed, stack.logs())
        wanted = weights(client, undisturbed)
        hit = 0
        for trial in range(0, KILLS, 2):
            job = uploaded.job(client)
            victims = [("worker", "engine", "api")[number % 3] for number in (trial, trial + 1)]
            for victim in victims:
                time.sleep(draw.uniform(0, length))
                if victim == "worker":
                    kill(worker)
                    until = time.monotonic() + 3
                    while descendants(stack):
                        assert time.monotonic() < until, "an engine outlived its worker"
                        time.sleep(0.05)
                    worker = stack.start_worker()
                elif victim == "engine":
                    for process in stack.engines():
                        hit += 1
                        process.send_signal(signal.SIGKILL)
                else:
                    kill(api)
                    api = stack.start_api()
            found = ends(client, job, stack)
            assert found["status"] == "succeeded", (trial, victims, found, stack.logs())
            assert weights(client, found) == wanted, (trial, victims)
            states = [event["data"]["status"] for event in client.jobs.events(job["id"]) if event["type"] == "state"]
            assert states.count("succeeded") == 1
        assert hit or KILLS < 6
    assert descendants(stack) == 0


def test_queue_folder_lost(make_stack: StackMaker, case: Case) -> None:
    stack = make_stack("laptop")
    stack.start_api()
    with stack.client() as client:
        uploaded = upload(client, case)
        waiting = [uploaded.job(client) for _ in range(2)]
        shutil.rmtree(stack.folder / "queue")
        stack.start_worker()
        assert ends(client, waiting[0], stack)["status"] == "succeeded"
        # Lost again, under the running worker's feet.
        shutil.rmtree(stack.folder / "queue")
        assert ends(client, waiting[1], stack)["status"] == "succeeded", stack.logs()
        assert ends(client, uploaded.job(client), stack)["status"] == "succeeded", stack.logs()


def test_redis_memory_lost(make_stack: StackMaker, case: Case) -> None:
    stack = make_stack("production")
    stack.start_api()
    with stack.client() as client:
        uploaded = upload(client, case)
        waiting = uploaded.job(client)
        redis.Redis.from_url(stack.environment["UNPOISON_QUEUE_URL"]).flushall()
        stack.start_worker()
        assert ends(client, waiting, stack)["status"] == "succeeded", stack.logs()


def test_a_stopped_worker_cannot_finish_what_another_took(make_stack: StackMaker, case: Case) -> None:
    stack = make_stack("production", UNPOISON_LEASE_SECONDS="2")
    stack.start_api()
    first = stack.start_worker()
    with stack.client() as client:
        uploaded = upload(client, case)
        job = uploaded.job(client, inversion_epochs=200, patience=1000)
        until = time.monotonic() + 60
        while not client.jobs.get(job["id"])["progress"]:
            assert time.monotonic() < until, stack.logs()
            time.sleep(0.1)
        owner = client.jobs.events(job["id"])[1]["data"]["owner"]
        # The worker and its pool process stop together, as when a machine is suspended; the engine goes on.
        pool = int(owner.rsplit(":", 1)[1])
        for process in (first.pid, pool):
            os.kill(process, signal.SIGSTOP)
        stack.start_worker()
        time.sleep(2 * 2.0)
        until = time.monotonic() + 60
        while client.jobs.get(job["id"])["attempt"] < 2:
            assert time.monotonic() < until, stack.logs()
            time.sleep(0.1)
        for process in (first.pid, pool):
            os.kill(process, signal.SIGCONT)
        found = ends(client, job, stack, seconds=200)
        assert found["status"] == "succeeded", stack.logs()
        events = client.jobs.events(job["id"])
        states = [event["data"] for event in events if event["type"] == "state"]
        # A busy machine may let the second lease run out as well, so the first worker may take the job anew and end it.
        assert {state["owner"] for state in states if state["status"] == "running"} - {owner}
        assert [state["status"] for state in states].count("succeeded") == 1 and states[-1]["status"] == "succeeded"
        assert found["attempt"] == sum(state["status"] == "running" for state in states)


@pytest.mark.timeout(600)
def test_two_workers_run_each_of_two_hundred_jobs_once(make_stack: StackMaker, case: Case, tmp_path: Path) -> None:
    """The engine here is a stand-in that ends at once: what is tested is who runs what."""
    stack = make_stack("production", UNPOISON_ENGINE_COMMAND=f"sh {Path(__file__).parent / 'instant_engine.sh'} {tmp_path / 'runs'}")
    stack.start_api()
    with stack.client() as client:
        uploaded = upload(client, case)
        made = [uploaded.job(client)["id"] for _ in range(200)]
        for _ in range(2):
            stack.start_worker()
        until = time.monotonic() + 300
        while True:
            with stack.database.read() as session:
                done = [job for job in made if jobs.get(session, job, tenant_of(stack, job)).status == "succeeded"]
            if len(done) == len(made):
                break
            assert time.monotonic() < until, (len(done), stack.logs())
            time.sleep(0.5)
        runs = (tmp_path / "runs").read_text().split()
        assert len(runs) == len(set(runs)) == 200
        owners = set()
        for job in made:
            states = [event for event in client.jobs.events(job) if event["type"] == "state"]
            assert [event["data"]["status"] for event in states] == ["queued", "running", "succeeded"]
            owners.add(states[1]["data"]["owner"])
        assert len(owners) == 2


def tenant_of(stack: Stack, job_id: str) -> str:
    from store.tables import Job

    with stack.database.read() as session:
        return session.get_one(Job, job_id).tenant


def test_a_stopping_worker_gives_its_job_back(make_stack: StackMaker, case: Case) -> None:
    stack = make_stack("laptop")
    stack.start_api()
    first = stack.start_worker()
    with stack.client() as client:
        uploaded = upload(client, case)
        job = uploaded.job(client, inversion_epochs=60)
        until = time.monotonic() + 60
        while not client.jobs.get(job["id"])["progress"]:
            assert time.monotonic() < until, stack.logs()
            time.sleep(0.1)
        first.terminate()
        first.wait(30)
        assert client.jobs.get(job["id"])["status"] == "queued"
        stack.start_worker()
        found = ends(client, job, stack)
        assert (found["status"], found["attempt"]) == ("succeeded", 2)


@pytest.mark.parametrize(("end", "advice"), [("kill -9 $$", "more memory"), ("echo ValueError: no >&2; exit 1", "Report this message")])
def test_a_job_that_always_crashes_is_given_up(end: str, advice: str, make_stack: StackMaker, case: Case) -> None:
    stack = make_stack("laptop", UNPOISON_ENGINE_COMMAND=f"sh -c '{end}' engine", UNPOISON_MAX_CRASHES="2")
    stack.start_api()
    stack.start_worker()
    with stack.client() as client:
        uploaded = upload(client, case)
        found = ends(client, uploaded.job(client), stack)
        assert (found["status"], found["error"]["code"], found["attempt"]) == ("crashed", "worker_lost", 2)
        assert advice in found["error"]["advice"] and ("kill" in end or "code 1: ValueError: no" in found["error"]["detail"])
        again = client.jobs.retry(found["id"])
        assert again["retry_of"] == found["id"]

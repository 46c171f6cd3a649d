"""The command line against a running service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import digits
from client import Client, ConnectionFailed
from client.cli import _verdicts
from client.terminal import plain
from core.attacks.badnets import BadNets
from tests.conftest import Case
from tests.stack import Stack, free_port


def unpoison(stack: Stack, *arguments: str, key: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "UNPOISON_URL": stack.url, "UNPOISON_API_KEY": key, "UNPOISON_DATA_FOLDER": str(stack.folder), "COLUMNS": "200", **more}
    return subprocess.run([sys.executable, "-m", "client.cli", *arguments], capture_output=True, text=True, env=environment, check=False)


# What the command line says is the same on every stack, and each of its commands starts Python.
on_one_stack = pytest.mark.parametrize("service", ["laptop"], indirect=True)


@on_one_stack
def test_a_session(service: Stack, case: Case, tmp_path: Path) -> None:
    key = service.make_key()

    def run(*arguments: str, code: int = 0) -> str:
        done = unpoison(service, *arguments, key=key)
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done.stdout.strip()

    # A preview says what the file is and keeps nothing.
    assert "wrn-10-1" in run("models", "inspect", str(case.model)) and run("-q", "models", "ls") == ""
    assert json.loads(run("--json", "datasets", "inspect", str(case.clean)))["description"]["count"] == 300
    model = run("-q", "models", "upload", str(case.model), "--name", "suspect")
    clean = run("-q", "datasets", "upload", str(case.clean))
    test = run("-q", "datasets", "upload", str(case.test))
    assert "suspect" in run("models", "ls") and json.loads(run("--json", "models", "show", model))["status"] == "ready"
    assert "mcldef" in run("methods", "propose", "model", "clean_images") and "scan" not in run("methods", "propose", "model")
    assert "Neural Cleanse" in run("methods", "ls") and "temperature" in run("methods", "show", "mcldef")
    plan = json.loads(run("--json", "jobs", "submit", "--model", model, "--dataset", clean, "--method", "mcldef", "-p", "target=5", "--dry-run"))
    assert plan["request"]["defense"]["target"] == 5
    few = ("-p", "target=5", "-p", "inversion_epochs=6", "-p", "epochs=3", "-p", "epoch_images=0")
    attack = ("--test", test, "--attack", "method=badnets target=5")
    job = run("-q", "jobs", "submit", "--model", model, "--dataset", clean, "--method", "mcldef", *few, *attack, "--wait")
    assert job in run("-q", "jobs", "ls", "--status", "succeeded")
    assert run("-q", "jobs", "watch", job) == job
    # A pipeline goes on by the verdict, not only by the job's end.
    assert "purified: the recovered trigger sends" in unpoison(service, "jobs", "watch", job, key=key).stderr
    assert run("-q", "jobs", "watch", job, "--require", "purified", "--require", "no_evidence") == job
    run("jobs", "watch", job, "--require", "no_evidence", code=6)
    assert "state" in run("jobs", "logs", job)
    target = tmp_path / "clean.safetensors"
    assert run("artifacts", "get", job, "-o", str(target)) == str(target) and target.stat().st_size > 1000
    measured = run("-q", "jobs", "submit", "--model", model, "--method", "evaluate", *attack, "--wait")
    assert json.loads(run("--json", "report", measured))["before"]["asr"]["n"] > 0
    assert "asr" in run("report", job) and json.loads(run("--json", "report", job))["method"] == "mcldef"
    run("models", "download", model, "-o", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == case.model.read_bytes()
    again = run("-q", "jobs", "retry", job)
    run("jobs", "cancel", again)
    assert run("-q", "jobs", "wait", again, code=4) == again
    assert run("-q", "jobs", "wait", job, job, "--require", "purified").split() == [job, job]
    run("jobs", "wait", job, "--require", "no_evidence", code=6)
    run("jobs", "rm", job)
    assert "not_found" in unpoison(service, "jobs", "show", job, key=key).stderr


@on_one_stack
def test_a_training_set_is_cleansed(service: Stack, case: Case, tmp_path: Path) -> None:
    key = service.make_key()

    def run(*arguments: str) -> str:
        done = unpoison(service, *arguments, key=key)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout.strip()

    poisoned = digits.poisoned(case.data.train, BadNets(method="badnets", target=5, sampling="S2"))
    suspect = run("-q", "datasets", "upload", str(digits.npz(poisoned, tmp_path / "crowd.npz")))
    understood = run("datasets", "upload", str(case.clean))
    assert "class_names" in understood and "unreadable" in understood and "│ tensors " not in run("models", "upload", str(case.model))
    clean = run("-q", "datasets", "upload", str(case.clean))
    quick = ("-p", "architecture=wrn-10-1", "-p", "recipe=cpu", "-p", "training_epochs=20")
    job = run("-q", "jobs", "submit", "--suspect", suspect, "--dataset", clean, "--method", "scan", *quick, "--wait")
    said = run("report", job)
    assert "1000 training images" in said and "poisoned: class 5 (" in said and "dropped" in said and "before" not in said
    manifest = tmp_path / "manifest.jsonl"
    run("artifacts", "get", job, "--kind", "manifest", "-o", str(manifest))
    kept = sum(json.loads(line)["action"] == "kept" for line in manifest.read_text().splitlines())
    cleansed = json.loads(run("--json", "jobs", "show", job))["cleansed_dataset_id"]
    run("datasets", "download", cleansed, "-o", str(tmp_path / "cleansed.npz"))
    with np.load(tmp_path / "cleansed.npz") as found:
        assert len(found["images"]) == kept < 1000
    plan = run("--json", "jobs", "submit", "--suspect", suspect, "--method", "d_br", "-p", 'split={"method":"fct","epochs":3}', "--dry-run")
    assert json.loads(plan)["request"]["defense"]["split"]["epochs"] == 3


def test_errors_are_one_sentence_and_an_exit_code(api: Stack, tmp_path: Path) -> None:
    key = api.make_key()
    (tmp_path / "bad.pt").write_bytes(b"no model")
    done = unpoison(api, "models", "upload", str(tmp_path / "bad.pt"), key=key)
    assert done.returncode == 1 and "unsupported_format" in done.stderr and "Traceback" not in done.stderr
    assert unpoison(api, "models", "ls", key="upk_wrong").returncode == 1
    lost = unpoison(api, "models", "ls", key=key, UNPOISON_URL=f"http://127.0.0.1:{free_port()}")
    assert lost.returncode == 1 and "does not answer" in lost.stderr
    assert unpoison(api, "jobs", "submit", key=key).returncode == 2


# What a formatter would obey: an unmatched tag, a hidden link, a format. The service takes what a terminal would obey out of names.
HOSTILE = "[/red] [link=https://evil]x[/link] {0.__class__}"


def test_a_verdict_comes_with_what_may_be_left() -> None:
    cleansing = {"verdict": "poisoned", "target": 1, "evidence": "its ratio stands out", "missed": "half of it is still in the set"}
    found = {"verdict": None, "cleansing": cleansing, "findings": {}}
    assert _verdicts(found) == [("poisoned", "class 1. its ratio stands out. half of it is still in the set")]
    del cleansing["missed"]
    assert _verdicts({**found, "class_names": ["cat", "dog"]}) == [("poisoned", "class 1 (dog). its ratio stands out")]
    cleansing["target"] = None
    assert _verdicts(found) == [("poisoned", "its ratio stands out")]
    cleansing |= {"verdict": "inconclusive", "target": 1}
    assert _verdicts(found) == [("inconclusive", "its ratio stands out")]


def test_names_are_shown_and_not_obeyed(api: Stack, case: Case, tmp_path: Path) -> None:
    key = api.make_key()

    def run(*arguments: str) -> str:
        done = unpoison(api, *arguments, key=key)
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    # A progress bar has the file's name as its title.
    file = tmp_path / "{0}[red]{task.nothing}.safetensors"
    file.write_bytes(case.model.read_bytes())
    assert HOSTILE in run("models", "upload", str(file), "--name", HOSTILE)
    model = run("-q", "models", "ls").strip()
    assert HOSTILE in run("models", "ls") and HOSTILE in run("models", "show", model)
    refused = run("models", "show", HOSTILE.replace("/", ""))
    assert "not_found" in refused
    # The messages of a job may quote what is in a file.
    assert plain("\x1b[31m\x9b31m\ttab \u202egnp").plain == r"\x1b[31m\x9b31m\ttab \u202egnp"
    assert run("models", "download", model, "-o", str(tmp_path / file.name)).strip() == ""


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[1]", "no JSON object")])
def test_a_file_of_parameters_that_is_none(api: Stack, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "params.json").write_text(text)
    done = unpoison(api, "jobs", "submit", "--method", "mcldef", "--params", str(tmp_path / "params.json"), key=api.make_key())
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_doctor_names_every_floor(api: Stack) -> None:
    done = unpoison(api, "--json", "doctor", key="x", **api.environment)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert {"database", "queue", "objects", "sandbox", "hardware"} <= set(found)
    assert found["database"]["state"] == "ok" and found["sandbox"]["layers"]


class Flaky(BaseHTTPRequestHandler):
    answers: list[tuple[int, dict[str, str]]] = []
    seen: list[str | None] = []

    def do_POST(self) -> None:
        self.seen.append(self.headers.get("Idempotency-Key"))
        self.rfile.read(int(self.headers.get("content-length", 0)))
        status, headers = self.answers.pop(0)
        body = json.dumps({"id": "job_1", "code": "store_unavailable", "detail": "away"}).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *ignored: Any) -> None:
        pass


@pytest.mark.parametrize(("answers", "tries"), [([(503, {"Retry-After": "0"}), (200, {})], 2), ([(503, {"X-Should-Retry": "false"})], 1), ([(422, {})], 1)])
def test_retries_keep_their_key_and_obey_the_server(answers: list[tuple[int, dict[str, str]]], tries: int) -> None:
    from client import ApiError

    Flaky.answers, Flaky.seen = list(answers), []
    server = HTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Client(f"http://127.0.0.1:{server.server_port}", "k") as client:
        if answers[-1][0] == 200:
            client.jobs.create(model="m", dataset="d", defense={})
        else:
            with pytest.raises(ApiError):
                client.jobs.create(model="m", dataset="d", defense={})
    server.shutdown()
    server.server_close()
    assert len(Flaky.seen) == tries and len(set(Flaky.seen)) == 1 and Flaky.seen[0]


def test_a_dead_service_is_said_so() -> None:
    with Client(f"http://127.0.0.1:{free_port()}", "k", retries=0) as client, pytest.raises(ConnectionFailed, match="does not answer"):
        client.jobs.list()

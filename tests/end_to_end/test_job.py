"""One job from upload to download, on both kinds of stack."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks import digits
from client import JobFailed
from client.flows import TERMINAL
from client.resources import succeeded
from core import poisoning
from core.attacks.badnets import BadNets
from tests.conftest import TARGET, Case, upload
from tests.stack import Stack


def test_a_backdoored_model_comes_back_purified(service: Stack, case: Case, tmp_path: Path) -> None:
    with service.client() as client:
        uploaded = upload(client, case)
        assert uploaded.model["description"]["architecture"] == "wrn-10-1"
        job = uploaded.job(client, measured=True, inversion_epochs=60, epochs=20)
        assert job["status"] == "queued"
        events = list(client.jobs.stream(job["id"]))
        job = client.jobs.get(job["id"])
        assert job["status"] == "succeeded", (job, service.logs())
        before, after = job["results"]["before"], job["results"]["after"]
        assert before["asr"]["value"] > 0.9
        assert after["asr"]["value"] < 0.2
        assert after["ba"]["value"] > before["ba"]["value"] - 0.05
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert events[-1]["data"]["status"] == "succeeded"
        assert {"asr", "ba"} <= {event["message"] for event in events if event["type"] == "metric"}
        artifacts = {item["kind"]: item for item in client.jobs.artifacts(job["id"])}
        assert set(artifacts) == {"cleaned_model", "report_json", "report_html", "trigger"}
        client.artifacts.download(artifacts["cleaned_model"]["id"], tmp_path / "clean.safetensors")
        assert hashlib.sha256((tmp_path / "clean.safetensors").read_bytes()).hexdigest() == artifacts["cleaned_model"]["sha256"]
        with safe_open(case.model, "pt") as original, safe_open(tmp_path / "clean.safetensors", "pt") as cleaned:
            assert set(original.keys()) == set(cleaned.keys())
        report = client.jobs.report(job["id"])
        assert report["after"] == after
        assert report["model"]["sha256"] == artifacts["cleaned_model"]["sha256"]
        cleaned_model = client.models.get(job["cleaned_model_id"])
        assert cleaned_model["origin_job_id"] == job["id"]
        assert client.jobs.list(status="succeeded")[0]["id"] == job["id"]


def test_a_model_that_got_worse_is_never_handed_out_as_purified(service: Stack, case: Case) -> None:
    with service.client() as client:
        uploaded = upload(client, case)
        known = {model["id"] for model in client.models.list()}
        job = client.jobs.create(model=uploaded.model["id"], dataset=uploaded.clean, defense={"method": "fine_tuning", "epochs": 1, "learning_rate": 5})
        job = client.jobs.wait(job["id"], timeout=120)
        assert (job["status"], job["error"]["code"], job["cleaned_model_id"]) == ("failed", "not_purified", None), job
        assert "fell from" in job["error"]["detail"] and job["error"]["advice"]
        with pytest.raises(JobFailed, match="fell from"):
            succeeded(job)
        assert job["results"]["verdict"]["verdict"] == "not_purified" and job["results"]["classes_lost"]
        # What happened can be read, and the weights are there as evidence only.
        assert {item["kind"] for item in client.jobs.artifacts(job["id"])} >= {"rejected_model", "report_json"}
        assert client.jobs.report(job["id"])["after"] == job["results"]["after"]
        assert {model["id"] for model in client.models.list()} == known


def test_a_purified_model_can_be_inspected(service: Stack, case: Case) -> None:
    with service.client() as client:
        uploaded = upload(client, case)
        job = client.jobs.wait(uploaded.job(client)["id"], timeout=120)
        again = client.jobs.create(model=job["cleaned_model_id"], dataset=uploaded.clean, defense={"method": "neural_cleanse", "passes": 3})
        found = client.jobs.wait(again["id"], timeout=120)
        assert found["status"] == "succeeded", found
        assert found["results"]["findings"]["verdict"] in ("backdoored", "no_evidence", "inconclusive", "not_fully_examined")


def test_cancel_ends_a_running_job_within_five_seconds(service: Stack, case: Case) -> None:
    with service.client() as client:
        uploaded = upload(client, case)
        job = uploaded.job(client, inversion_epochs=10_000, patience=10_000)
        until = time.monotonic() + 60
        while not (client.jobs.get(job["id"])["progress"] or {}).get("step"):
            assert time.monotonic() < until, service.logs()
            time.sleep(0.1)
        known = service.objects.digests()
        started = time.monotonic()
        assert client.jobs.cancel(job["id"])["status"] == "cancelling"
        while client.jobs.get(job["id"])["status"] not in TERMINAL:
            time.sleep(0.05)
        assert time.monotonic() - started < 5
        assert client.jobs.get(job["id"])["status"] == "cancelled"
        assert service.engines() == []
        assert not list((service.folder / "scratch" / "jobs").glob(f"{job['id']}*"))
        assert not list(service.objects.incoming(service.folder / "scratch").iterdir())
        # What was stored since is whole: a checkpoint that the next tidying removes.
        for digest in service.objects.digests() - known:
            service.objects.fetch(digest, service.folder / "object")
        assert client.jobs.artifacts(job["id"]) == []
        assert client.jobs.cancel(job["id"])["status"] == "cancelled"


def test_a_model_is_measured_with_the_attack_or_with_triggered_images(service: Stack, case: Case, tmp_path: Path) -> None:
    trigger = poisoning.declared(BadNets(method="badnets", target=TARGET), (1, 16, 16), 10)
    stamped = replace(case.data.test, images=trigger.stamp(case.data.test.images))
    with service.client() as client:
        uploaded = upload(client, case)
        triggered = client.datasets.upload(digits.npz(stamped, tmp_path / "triggered.npz"))
        found = []
        for known in ({"attack": {"method": "badnets", "target": TARGET}}, {"triggered": {"dataset_id": triggered["id"], "target": TARGET}}):
            evaluation = {"dataset_id": uploaded.test["id"], **known}
            job = client.jobs.create(model=uploaded.model, defense={"method": "evaluate"}, evaluation=evaluation)
            assert job["dataset_id"] is None and job["kind"] == "evaluate"
            job = succeeded(client.jobs.wait(job["id"], timeout=120))
            assert {item["kind"] for item in client.jobs.artifacts(job["id"])} == {"report_json", "report_html"}
            found.append(job["results"]["before"])
        assert found[0] == found[1]
        assert found[0]["asr"]["value"] > 0.9 and found[0]["asr"]["low"] < found[0]["asr"]["value"]


def test_engine_says_why_it_cannot(service: Stack, case: Case, tmp_path: Path) -> None:
    with service.client() as client:
        uploaded = upload(client, case)
        np.savez(tmp_path / "small.npz", images=np.zeros((20, 8, 8, 1), np.uint8), labels=np.arange(20) % 10)
        small = {"dataset_id": client.datasets.upload(tmp_path / "small.npz")["id"]}
        job = client.jobs.create(model=uploaded.model, dataset=uploaded.clean, defense={"method": "mcldef", "target": TARGET}, evaluation=small)
        job = client.jobs.wait(job["id"], timeout=120)
        assert job["status"] == "failed"
        assert job["error"]["code"] == "dataset_invalid"
        assert "clean images are (1, 16, 16)" in job["error"]["detail"] and "one size" in job["error"]["advice"]
        with pytest.raises(JobFailed, match="test images are"):
            succeeded(job)


def test_a_job_that_takes_too_long_fails_with_timeout(service: Stack, case: Case) -> None:
    with service.client() as client:
        uploaded = upload(client, case)
        job = client.jobs.create(
            model=uploaded.model,
            dataset=uploaded.clean,
            max_seconds=1.0,
            defense={"method": "mcldef", "target": TARGET, "inversion_epochs": 10_000, "patience": 10_000},
        )
        job = client.jobs.wait(job["id"], timeout=60)
        assert (job["status"], job["error"]["code"]) == ("failed", "timeout")

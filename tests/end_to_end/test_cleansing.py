"""A poisoned training set from upload to cleansed download, and models trained safely on it."""

from __future__ import annotations

import io
import json
import os
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import digits
from client.errors import ApiError, Rejected
from core.attacks.badnets import BadNets
from core.images import ImageSet
from tests.conftest import TARGET, Case, StackMaker
from tests.stack import Stack

TRAINED = {"architecture": "wrn-10-1", "recipe": "cpu", "training_epochs": 20}
SCAN = {"method": "scan", **TRAINED}


def zipped(data: ImageSet, path: Path, **more: bytes) -> Path:
    """Write a set as class folders of PNG files, as a user would."""
    assert data.labels is not None
    with zipfile.ZipFile(path, "w") as out:
        for index, label in enumerate(data.labels.tolist()):
            picture = io.BytesIO()
            Image.fromarray(data.images[index, 0].numpy()).save(picture, "PNG")
            out.writestr(f"train/{data.class_names[label]}/{index:05}.png", picture.getvalue())
        for name, content in more.items():
            out.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def poisoned(case: Case) -> ImageSet:
    return digits.poisoned(case.data.train, BadNets(method="badnets", target=TARGET, sampling="S2"))


def test_a_poisoned_set_comes_back_cleansed(service: Stack, case: Case, poisoned: ImageSet, tmp_path: Path) -> None:
    upload = zipped(poisoned, tmp_path / "crowd.zip", **{"train/3/damaged.png": b"no picture"})
    with service.client() as client:
        suspect = client.datasets.upload(upload, name="crowd")
        assert [one["name"] for one in suspect["description"]["unreadable"]] == ["train/3/damaged.png"]
        clean = client.datasets.upload(case.clean)
        job = client.jobs.create(suspect_dataset=suspect, dataset=clean, defense=SCAN)
        assert (job["kind"], job["model_id"], job["suspect_dataset_id"]) == ("cleanse", None, suspect["id"])
        job = client.jobs.wait(job["id"], timeout=300)
        assert job["status"] == "succeeded", (job, service.logs())
        found = job["results"]["cleansing"]
        assert (found["verdict"], found["target"]) == ("poisoned", TARGET)

        artifacts = {item["kind"]: item for item in client.jobs.artifacts(job["id"])}
        assert set(artifacts) == {"manifest", "report_json", "report_html"}
        client.artifacts.download(artifacts["manifest"]["id"], tmp_path / "manifest.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
        assert len(lines) == len(poisoned) + 1 and "cannot be read" in lines[-1]["reason"]
        assert {action: sum(line["action"] == action for line in lines[:-1]) for action in ("kept", "dropped")} == {
            name: found["counts"][name] for name in ("kept", "dropped")
        }

        cleansed = client.datasets.get(job["cleansed_dataset_id"])
        until = time.monotonic() + 60
        while cleansed["status"] == "received" and time.monotonic() < until:
            time.sleep(0.2)
            cleansed = client.datasets.get(cleansed["id"])
        assert cleansed["status"] == "ready" and cleansed["name"] == "crowd after scan" and cleansed["origin_job_id"] == job["id"]
        assert cleansed["description"]["layout"] == "class_folders" and cleansed["description"]["count"] == found["counts"]["kept"]
        client.datasets.download(cleansed["id"], tmp_path / "cleansed.zip")
        with zipfile.ZipFile(upload) as before, zipfile.ZipFile(tmp_path / "cleansed.zip") as after:
            assert sorted(after.namelist()) == sorted(line["path"] for line in lines if line["path"])
            assert all(after.read(name) == before.read(name) for name in after.namelist())

        # The cleansed set can be trained on like any other.
        again = client.jobs.create(suspect_dataset=cleansed, dataset=clean, defense=SCAN, validate_only=True)
        assert again["object"] == "plan"
        client.jobs.delete(job["id"])
        assert client.datasets.get(cleansed["id"])["status"] == "ready"


def test_a_model_is_trained_on_what_is_left(service: Stack, case: Case, poisoned: ImageSet, tmp_path: Path) -> None:
    with service.client() as client:
        suspect = client.datasets.upload(digits.npz(poisoned, tmp_path / "crowd.npz"))
        clean, test = client.datasets.upload(case.clean), client.datasets.upload(case.test)
        evaluation = {"dataset_id": test["id"], "attack": {"method": "badnets", "target": TARGET}}
        job = client.jobs.create(suspect_dataset=suspect, dataset=clean, defense={"method": "retrain", **TRAINED, "split": SCAN}, evaluation=evaluation)
        job = client.jobs.wait(job["id"], timeout=300)
        assert job["status"] == "succeeded", (job, service.logs())
        before, after = job["results"]["before"], job["results"]["after"]
        assert before["asr"]["value"] > 0.9 and after["asr"]["value"] < 0.1
        assert after["ba"]["value"] > before["ba"]["value"] - 0.03
        model = client.models.get(job["cleaned_model_id"])
        assert model["description"]["architecture"] == "wrn-10-1" and model["description"]["classes"] == 10
        # It is a model like any other: it can be measured again, and gives the same numbers.
        measured = client.jobs.create(model=model, defense={"method": "evaluate"}, evaluation=evaluation, preprocessing={"mean": [0.0], "std": [1.0]})
        measured = client.jobs.wait(measured["id"], timeout=120)
        assert measured["results"]["before"]["ba"] == after["ba"] and measured["results"]["before"]["asr"] == after["asr"]


def test_a_killed_cleansing_goes_on(make_stack: StackMaker, case: Case, poisoned: ImageSet, tmp_path: Path) -> None:
    stack = make_stack("laptop")
    stack.start_api()
    stack.start_worker()
    with stack.client() as client:
        suspect, clean = client.datasets.upload(zipped(poisoned, tmp_path / "crowd.zip")), client.datasets.upload(case.clean)
        bodies: list[dict[str, Any]] = []
        for kill in (False, True):
            job = client.jobs.create(suspect_dataset=suspect, dataset=clean, defense=SCAN)
            if kill:
                until = time.monotonic() + 120
                while client.jobs.get(job["id"])["phase"] != "training" and time.monotonic() < until:
                    time.sleep(0.1)
                time.sleep(2)
                worker = stack.processes[-1]
                for child in stack.engines():
                    child.kill()
                os.killpg(worker.pid, signal.SIGKILL)
                stack.start_worker()
            job = client.jobs.wait(job["id"], timeout=300)
            assert job["status"] == "succeeded", (job, stack.logs())
            assert not kill or job["attempt"] > 1
            manifest = next(item for item in client.jobs.artifacts(job["id"]) if item["kind"] == "manifest")
            bodies.append({"manifest": manifest["sha256"], "set": client.datasets.get(job["cleansed_dataset_id"])["sha256"]})
        assert bodies[0] == bodies[1]


def small(case: Case, tmp_path: Path, name: str) -> Path:
    """Return a training set that cannot be judged."""
    data = case.data.train
    assert data.labels is not None
    if name == "one class":
        return zipped(data.subset((data.labels == 3).nonzero()[:, 0]), tmp_path / "x.zip")
    if name == "few":
        return zipped(data.subset(torch.cat([(data.labels != 3).nonzero()[:, 0], (data.labels == 3).nonzero()[:5, 0]])), tmp_path / "x.zip")
    if name == "unlabelled":
        path = tmp_path / "x.npz"
        np.savez(path, images=data.images.permute(0, 2, 3, 1).numpy())
        return path
    return zipped(data, tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("name", "defense", "code", "words"),
    [
        ("one class", {"method": "fct"}, "dataset_invalid", "of one class, '3'"),
        ("few", {"method": "fct"}, "dataset_invalid", "fewer than 10 images cannot be judged: 3 (5)"),
        ("unlabelled", {"method": "fct"}, "dataset_invalid", "has no labels"),
        ("good", {"method": "fct", "architecture": "resnet-eighteen"}, "architecture_unknown", "Close to it"),
        ("good", {"method": "d_br", "split": {"method": "fct", "architecture": "nothing"}}, "architecture_unknown", "no architecture 'nothing'"),
        ("good", {"method": "trap_and_replace"}, "invalid_parameters", "needs clean images"),
        ("good", {"method": "d_br", "split": {"method": "scan"}}, "invalid_parameters", "needs clean images"),
        ("good", {"method": "mcldef"}, "invalid_parameters", "needs a suspect model"),
    ],
)
def test_a_training_set_that_cannot_be_judged_is_refused_at_once(
    service: Stack, case: Case, tmp_path: Path, name: str, defense: dict[str, Any], code: str, words: str
) -> None:
    with service.client() as client:
        suspect = client.datasets.upload(small(case, tmp_path, name))
        with pytest.raises(ApiError) as refused:
            client.jobs.create(suspect_dataset=suspect, defense=defense)
        assert refused.value.code == code and words in str(refused.value)


def test_pictures_of_all_sizes_are_taken_with_resize(service: Stack, case: Case, tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out:
        for index in range(20):
            picture = io.BytesIO()
            Image.new("L", (16 + index, 20), index * 10).save(picture, "PNG")
            out.writestr(f"{index % 2}/{index}.png", picture.getvalue())
    with service.client() as client:
        assert client.datasets.inspect(path, resize=16)["description"]["height"] == 16
        with pytest.raises(Rejected, match="differ in size"):
            client.datasets.upload(path)
        found = client.datasets.upload(path, resize=16)
        assert found["resize"] == 16 and found["description"]["width"] == 16 and found["status"] == "ready"
        with pytest.raises(ApiError, match="Only pictures are resized"):
            client.models.upload(case.model, resize=16)
        # The upload itself is as it was sent.
        client.datasets.download(found["id"], tmp_path / "back.zip")
        assert (tmp_path / "back.zip").read_bytes() == path.read_bytes()


def test_mixed_sizes_duplicate_names_and_labels_that_do_not_match_are_refused_when_they_arrive(api: Stack, tmp_path: Path) -> None:
    def png(side: int) -> bytes:
        out = io.BytesIO()
        Image.new("L", (side, side)).save(out, "PNG")
        return out.getvalue()

    for files, words in (
        ({"a/1.png": png(16), "b/1.png": png(17)}, "differ in size"),
        ({"a/1.png": png(16), "a/1.PNG": png(16)}, "appears twice"),
        ({"1.png": png(16), "labels.csv": b"file,label\n2.png,cat\n"}, "no file of labels.csv is in the archive"),
    ):
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as out:
            for name, content in files.items():
                out.writestr(name, content)
        with api.client() as client, pytest.raises(Rejected, match=words):
            client.datasets.upload(path)

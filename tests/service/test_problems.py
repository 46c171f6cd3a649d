"""Every code of the catalogue, provoked through HTTP."""

from __future__ import annotations

import io
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save

from core.architectures.wide_resnet import WideResNet
from service.problems import CATALOGUE
from tests.conftest import Case, StackMaker, Uploaded, upload
from tests.stack import Stack

SEEN: set[str] = set()


@dataclass
class World:
    """An API without workers, a client of one tenant, and what it has uploaded."""

    stack: Stack
    http: httpx.Client
    uploaded: Uploaded
    case: Case
    key: str

    def job(self, **change: Any) -> dict[str, Any]:
        body = {"model_id": self.uploaded.model["id"], "dataset_id": self.uploaded.clean["id"], "defense": {"method": "mcldef", "target": 5}}
        return body | change

    def evaluation(self, **attack: Any) -> dict[str, Any]:
        return {"dataset_id": self.uploaded.test["id"], "attack": {"method": "badnets", "target": 5} | attack}

    def triggered(self) -> dict[str, Any]:
        return {"dataset_id": self.uploaded.test["id"], "target": 5}

    def made(self) -> str:
        return str(self.http.post("/v1/jobs", json=self.job()).json()["id"])

    def begun(self) -> str:
        return str(self.http.post("/v1/uploads", json={"kind": "model", "bytes": 5}).headers["location"])

    def put(self, kind: str, data: bytes, **headers: str) -> httpx.Response:
        return self.http.post(f"/v1/{kind}", content=data, headers={"Content-Type": "application/octet-stream", **headers})


@pytest.fixture(scope="module")
def world(api: Stack, case: Case) -> Iterator[World]:
    with api.client() as client:
        uploaded = upload(client, case)
        key = client._transport._http.headers["Authorization"]
        with httpx.Client(base_url=api.url, headers={"Authorization": key}, timeout=60) as http:
            yield World(api, http, uploaded, case, key)


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name, data in files.items():
            target.writestr(name, data)
    return out.getvalue()


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def pickled() -> bytes:
    out = io.BytesIO()
    torch.save(torch.nn.Linear(1, 1), out)
    return out.getvalue()


def bent() -> bytes:
    state = WideResNet(depth=10, width=1, classes=10).state_dict()
    return save({**state, "block2.layer.0.conv2.weight": torch.zeros(5, 5, 3, 3)})


def with_other_key(world: World, method: str, path: str, **key: Any) -> httpx.Response:
    secret = world.stack.make_key(**key)
    return httpx.request(method, world.stack.url + path, headers={"Authorization": f"Bearer {secret}"})


def reused(world: World) -> httpx.Response:
    headers = {"Idempotency-Key": "the-same"}
    assert world.http.post("/v1/jobs", json=world.job(), headers=headers).status_code == 202
    return world.http.post("/v1/jobs", json=world.job(seed=4), headers=headers)


def rejected_then_used(world: World) -> httpx.Response:
    refused = world.put("models", pickled())
    return world.http.post("/v1/jobs", json=world.job(model_id=refused.headers["location"].rsplit("/", 1)[-1]))


def in_use(world: World) -> httpx.Response:
    world.made()
    return world.http.delete(f"/v1/models/{world.uploaded.model['id']}")


def nan() -> bytes:
    state = WideResNet(depth=10, width=1, classes=10).state_dict()
    return save({**state, "fc.bias": torch.full((10,), float("nan"))})


PROVOKED: list[tuple[str, str, Callable[[World], httpx.Response]]] = [
    ("malformed_body", "not JSON", lambda w: w.http.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})),
    ("malformed_body", "no part called", lambda w: w.http.post("/v1/models", files={"other": b"x"})),
    ("malformed_body", "empty", lambda w: w.put("models", b"")),
    ("unauthenticated", "Authorization", lambda w: httpx.get(f"{w.stack.url}/v1/jobs")),
    ("unauthenticated", "not known", lambda w: httpx.get(f"{w.stack.url}/v1/jobs", headers={"Authorization": "Bearer upk_wrong"})),
    ("key_expired", "expired", lambda w: with_other_key(w, "GET", "/v1/jobs", expires_at=time.time() - 1)),
    ("insufficient_scope", "write", lambda w: with_other_key(w, "POST", "/v1/jobs/job_x/cancel", scopes=("read",))),
    ("insufficient_scope", "admin", lambda w: with_other_key(w, "GET", "/v1/keys", scopes=("read", "write"))),
    ("not_found", "no job", lambda w: w.http.get("/v1/jobs/job_0")),
    ("not_found", "no method", lambda w: w.http.get("/v1/methods/nothing")),
    ("not_found", "", lambda w: w.http.get("/nowhere")),
    ("report_not_ready", "comes with success", lambda w: w.http.get(f"/v1/jobs/{w.made()}/report")),
    ("method_not_allowed", "", lambda w: w.http.put("/v1/jobs")),
    ("not_acceptable", "application/json", lambda w: w.http.get(f"/v1/jobs/{w.made()}/report", headers={"Accept": "application/pdf"})),
    ("not_terminal", "cancel it first", lambda w: w.http.delete(f"/v1/jobs/{w.made()}")),
    ("not_terminal", "wait for its end", lambda w: w.http.post(f"/v1/jobs/{w.made()}/retry")),
    ("in_use", "needs model", in_use),
    ("upload_mode", "parts come here", lambda w: w.http.post(f"{w.begun()}/urls")),
    ("offset_mismatch", "0 of 5 bytes", lambda w: w.http.post(f"{w.begun()}/complete", json={"sha256": "0" * 64})),
    ("offset_mismatch", "goes on at byte 0", lambda w: w.http.patch(w.begun(), content=b"x", headers={"Upload-Offset": "3"})),
    ("too_large", "3000000", lambda w: w.http.post("/v1/uploads", json={"kind": "model", "bytes": 3_000_001})),
    ("not_ready", "rejected", rejected_then_used),
    ("too_large", "3000000", lambda w: w.put("models", b"\0" * 3_000_001)),
    ("too_large", "3000000", lambda w: w.http.post("/v1/models", content=iter([b"\0" * 1_000_000] * 4))),
    ("unsupported_media_type", "octet-stream", lambda w: w.put("models", b"{}", **{"Content-Type": "application/json"})),
    ("range_not_satisfiable", "bytes", lambda w: w.http.get(f"/v1/models/{w.uploaded.model['id']}/content", headers={"Range": "bytes=99999999-"})),
    ("invalid_parameters", "/defense/epochs", lambda w: w.http.post("/v1/jobs", json=w.job(defense={"method": "mcldef", "epochs": 0}))),
    ("invalid_parameters", "/defense/speed", lambda w: w.http.post("/v1/jobs", json=w.job(defense={"method": "mcldef", "speed": 1}))),
    ("invalid_parameters", "mcldef", lambda w: w.http.post("/v1/jobs", json=w.job(defense={"method": "magic"}))),
    ("invalid_parameters", "must be a number", lambda w: w.http.post("/v1/jobs", json=w.job(defense={"method": "mcldef", "epochs": "5"}))),
    ("invalid_parameters", "10 classes", lambda w: w.http.post("/v1/jobs", json=w.job(defense={"method": "mcldef", "target": 10}))),
    ("invalid_parameters", "/surprise", lambda w: w.http.post("/v1/jobs", json=w.job(surprise=1))),
    ("invalid_parameters", "needs clean images", lambda w: w.http.post("/v1/jobs", json=w.job(dataset_id=None))),
    ("invalid_parameters", "labelled test set", lambda w: w.http.post("/v1/jobs", json=w.job(defense={"method": "evaluate"}))),
    ("invalid_parameters", "lies outside images of 16x16", lambda w: w.http.post("/v1/jobs", json=w.job(evaluation=w.evaluation(right=14)))),
    ("invalid_parameters", "has to be trained", lambda w: w.http.post("/v1/jobs", json=w.job(evaluation=w.evaluation(method="ssba")))),
    ("invalid_parameters", "/evaluation/attack/rate", lambda w: w.http.post("/v1/jobs", json=w.job(evaluation=w.evaluation(rate=1.5)))),
    ("invalid_parameters", "Give one of them", lambda w: w.http.post("/v1/jobs", json=w.job(evaluation=w.evaluation() | {"triggered": w.triggered()}))),
    ("invalid_parameters", "10 classes", lambda w: w.http.post("/v1/jobs", json=w.job(evaluation=w.evaluation(target=10)))),
    ("idempotency_key_reused", "another request", reused),
    ("digest_mismatch", "sha-256", lambda w: w.put("models", b"abc", **{"Repr-Digest": "sha-256=:AAAA:"})),
    ("unsafe_file", "pickled model object", lambda w: w.put("models", pickled())),
    ("unsupported_format", "no checkpoint", lambda w: w.put("models", b"I am a model" * 10)),
    ("unsupported_format", "neither a zip", lambda w: w.put("datasets", b"I am a zip")),
    ("damaged_file", "header", lambda w: w.put("models", w.case.model.read_bytes()[:-7])),
    ("weights_not_finite", "fc.bias", lambda w: w.put("models", nan())),
    ("architecture_unknown", "no architecture", lambda w: w.put("models", save({"layer.weight": torch.zeros(2, 2)}))),
    ("architecture_mismatch", "contradict", lambda w: w.put("models", bent())),
    ("architecture_mismatch", "wrn-10-1, not", lambda w: w.http.post("/v1/jobs", json=w.job(architecture="resnet18"))),
    ("dataset_invalid", "is empty", lambda w: w.put("datasets", npz(images=np.zeros((0, 8, 8, 1), np.uint8)))),
    ("dataset_invalid", "has 3 classes, the model 10", lambda w: w.http.post("/v1/jobs", json=w.job(dataset_id=other_classes(w)))),
    ("dataset_invalid", "channels", lambda w: w.http.post("/v1/jobs", json=w.job(dataset_id=coloured(w)))),
    ("dataset_invalid", "no labels", lambda w: w.http.post("/v1/jobs", json=w.job(defense={"method": "fine_tuning"}, dataset_id=unlabelled(w)))),
    ("dataset_invalid", "no labels", lambda w: w.http.post("/v1/jobs", json=w.job(evaluation={"dataset_id": unlabelled(w)}))),
    ("dataset_invalid", "Class 1 is 'dog' in data set", lambda w: w.http.post("/v1/jobs", json=cleansing(w, ("cat", "dog"), ("cat", "horse")))),
    ("invalid_parameters", "the very file that is not trusted", lambda w: w.http.post("/v1/jobs", json=cleansing(w, ("cat", "dog"), ("cat", "dog")))),
]


def cleansing(world: World, *names: tuple[str, ...]) -> dict[str, Any]:
    """Ask for a training set to be cleansed with the help of the same pictures, whose classes have these names in the one and in the other."""
    suspect, clean = (
        world.put("datasets", npz(images=np.zeros((20, 16, 16, 1), np.uint8), labels=np.arange(20) % 2, class_names=np.array(which))).json()["id"]
        for which in names
    )
    return {"suspect_dataset_id": suspect, "dataset_id": clean, "defense": {"method": "scan", "architecture": "wrn-10-1"}}


def other_classes(world: World) -> str:
    data = npz(images=np.zeros((3, 16, 16, 1), np.uint8), labels=np.arange(3), class_names=np.array(["a", "b", "c"]))
    return str(world.put("datasets", data).json()["id"])


def coloured(world: World) -> str:
    return str(world.put("datasets", npz(images=np.zeros((10, 16, 16, 3), np.uint8), labels=np.arange(10))).json()["id"])


def unlabelled(world: World) -> str:
    return str(world.put("datasets", npz(images=np.zeros((10, 16, 16, 1), np.uint8))).json()["id"])


@pytest.mark.parametrize(("code", "words", "act"), PROVOKED, ids=[f"{code}-{index}" for index, (code, _, _) in enumerate(PROVOKED)])
def test_provoked(world: World, code: str, words: str, act: Callable[[World], httpx.Response]) -> None:
    answer = act(world)
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert (problem["code"], problem["status"], answer.status_code) == (code, CATALOGUE[code].status, CATALOGUE[code].status), problem
    assert words in problem["detail"] + str(problem["errors"]), problem
    assert problem["request_id"] == answer.headers["request-id"]
    assert len(problem["detail"]) < 2000 and "Traceback" not in problem["detail"]
    SEEN.add(code)
    # Nothing else was harmed.
    assert world.http.get(f"/v1/models/{world.uploaded.model['id']}").json()["status"] == "ready"


def test_a_dead_database_is_store_unavailable(make_stack: StackMaker, tmp_path: Path) -> None:
    stack = make_stack("production")
    stack.start_api()
    with stack.client(retries=0) as client:
        import sqlalchemy as sa

        url = stack.database.url
        stack.database.engine.dispose()
        admin = sa.create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(sa.text(f'alter database "{url.database}" with allow_connections false'))
            connection.execute(sa.text(f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{url.database}'"))
            answer = client._transport._http.get("/v1/jobs")
            assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "store_unavailable", "5")
            SEEN.add(answer.json()["code"])
            assert httpx.get(f"{stack.url}/readyz", timeout=30).status_code == 503
            assert httpx.get(f"{stack.url}/livez").status_code == 200
            connection.execute(sa.text(f'alter database "{url.database}" with allow_connections true'))
        assert client._transport._http.get("/v1/jobs").status_code == 200
        admin.dispose()


def test_a_full_disk_is_storage_full(make_stack: StackMaker) -> None:
    """A limit on the size of files stands in for a full disk: both are refused by the kernel while writing."""
    stack = make_stack("laptop")
    stack.start_api(file_bytes=2_000_000)
    with stack.client(retries=0) as client:
        answer = client._transport._http.post("/v1/models", content=b"\0" * 3_000_000, headers={"Content-Type": "application/octet-stream"})
        assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
        SEEN.add("storage_full")
        assert not list(stack.objects.incoming(stack.folder).iterdir())
        assert client.models.list() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with 40 MB; making one is root's privilege."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_that_does_not_fit_yet_is_read_when_there_is_room(make_stack: StackMaker, small_disk: Path, tmp_path: Path) -> None:
    def images(count: int) -> bytes:
        np.savez(tmp_path / "made.npz", images=np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
        return (tmp_path / "made.npz").read_bytes()

    stack = make_stack("laptop", UNPOISON_OBJECTS_URL=f"file://{small_disk}", UNPOISON_INTAKE_WAIT_SECONDS="1.5")
    stack.start_api()
    with stack.client(retries=0) as client:
        http: Any = client._transport._http  # type: ignore[attr-defined]

        def post(data: bytes) -> httpx.Response:
            answer: httpx.Response = http.post("/v1/datasets", content=data, headers={"Content-Type": "application/octet-stream"})
            return answer

        def ready(one: dict[str, Any]) -> None:
            until = time.monotonic() + 30
            while (now := client.datasets.get(one["id"]))["status"] != "ready":
                assert now["status"] == "received" and time.monotonic() < until, (now, stack.logs())
                time.sleep(0.2)

        first = images(2000)
        kept = post(first).json()
        ready(kept)
        (small_disk / "filler").write_bytes(b"\0" * 20_000_000)
        # The file itself fits, what is read from it does not; nothing is said against the file.
        waiting = post(images(1900)).json()
        assert (waiting["status"], waiting["refusal"]) == ("received", None)
        assert post(images(3000)).json()["code"] == "storage_full"
        (small_disk / "filler").unlink()
        ready(waiting)
        assert http.get(f"/v1/datasets/{kept['id']}/content").content == first


def test_a_full_disk_is_nothing_against_a_file(case: Case, tmp_path: Path) -> None:
    from intake.__main__ import _examine

    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    said, code = _examine("model", case.model, tmp_path, None)
    assert (said["code"], code) == ("storage_full", 3)


def test_an_unforeseen_error_is_internal_and_says_nothing_inside(world: World) -> None:
    import sqlalchemy as sa

    from store.tables import Job

    job = world.made()
    with world.stack.database.write() as session:
        session.execute(sa.update(Job).where(Job.id == job).values(request={"altered": "by hand"}))
    answer = world.http.get(f"/v1/jobs/{job}")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "KeyError" not in answer.text and "defense" not in answer.text
    SEEN.add("internal")
    with world.stack.database.write() as session:
        session.execute(sa.delete(Job).where(Job.id == job))


def test_a_limit_is_quota_exceeded(make_stack: StackMaker) -> None:
    stack = make_stack("laptop", UNPOISON_QUOTA_UPLOADS="0")
    stack.start_api()
    headers = {"Authorization": f"Bearer {stack.make_key()}", "Content-Type": "application/octet-stream"}
    answer = httpx.post(f"{stack.url}/v1/models", content=b"x", headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (403, "quota_exceeded")
    SEEN.add("quota_exceeded")


def test_the_whole_catalogue_was_provoked() -> None:
    assert set(CATALOGUE) == SEEN

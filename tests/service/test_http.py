"""Downloads, keys, idempotency, events, tenants, memory."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from client import ApiError, AsyncClient, Client
from client.errors import DigestMismatch, NotFound, Rejected
from tests.conftest import Case, StackMaker, upload
from tests.stack import Stack


def raw(client: Client) -> httpx.Client:
    return client._transport._http


def test_downloads_know_ranges_conditions_and_digests(api: Stack, case: Case) -> None:
    with api.client() as client:
        model = client.models.upload(case.model)
        data = case.model.read_bytes()
        http, path = raw(client), f"/v1/models/{model['id']}/content"
        whole = http.get(path)
        digest = hashlib.sha256(data).hexdigest()
        assert whole.content == data and whole.headers["etag"] == f'"sha256:{digest}"'
        assert whole.headers["repr-digest"] == f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:"
        assert whole.headers["content-disposition"] == "attachment; filename*=UTF-8''suspect.safetensors"
        head = http.head(path)
        assert head.headers["content-length"] == str(len(data)) and head.content == b""
        for wanted, start, end in (
            ("bytes=0-9", 0, 10),
            ("bytes=100-", 100, len(data)),
            ("bytes=-7", len(data) - 7, len(data)),
            ("bytes=5-99999999", 5, len(data)),
        ):
            part = http.get(path, headers={"Range": wanted})
            assert (part.status_code, part.content) == (206, data[start:end])
            assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"
        assert http.get(path, headers={"Range": "bytes=0-9", "If-Range": '"other"'}).status_code == 200
        assert http.get(path, headers={"Range": "bytes=0-9", "If-Range": whole.headers["etag"]}).status_code == 206
        assert http.get(path, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
        for ignored in ("bytes=9-2", "lines=1-2", "bytes=0-1,4-5", "bytes=-"):
            assert http.get(path, headers={"Range": ignored}).status_code == 200
        beyond = http.get(path, headers={"Range": "bytes=999999999-"})
        assert beyond.headers["content-range"] == f"bytes */{len(data)}"


def test_uploads_as_form_and_with_digest(api: Stack, case: Case) -> None:
    with api.client() as client:
        data = case.model.read_bytes()
        made = raw(client).post("/v1/models", files={"file": ("my model.safetensors", data)}, data={"name": "mine"})
        assert made.status_code == 201 and made.json()["name"] == "mine" and made.json()["filename"] == "my model.safetensors"
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        headers = {"Content-Type": "application/octet-stream", "Repr-Digest": f"sha-256=:{digest}:"}
        again = raw(client).post("/v1/models", params={"filename": "../../etc/x.bin"}, content=data, headers=headers)
        assert again.json()["filename"] == "x.bin" and again.json()["sha256"] == made.json()["sha256"]
        assert made.headers["location"] == f"/v1/models/{made.json()['id']}"


def test_a_refused_file_is_kept_as_a_finding(api: Stack, tmp_path: Path) -> None:
    with api.client() as client:
        (tmp_path / "bad.pt").write_bytes(b"x" * 100)
        with pytest.raises(Rejected) as refusal:
            client.models.upload(tmp_path / "bad.pt")
        assert refusal.value.code == "unsupported_format"
        (row,) = client.models.list()
        assert row["status"] == "rejected" and row["refusal"]["code"] == "unsupported_format" and row["refusal"]["advice"]
        client.models.delete(row["id"])
        assert client.models.list() == []


def test_polling_with_etag_and_wait(api: Stack, case: Case) -> None:
    with api.client() as client:
        job = upload(client, case).job(client)
        path, http = f"/v1/jobs/{job['id']}", raw(client)
        first = http.get(path)
        assert first.headers["etag"] == '"1"'
        assert http.get(path, headers={"If-None-Match": '"1"'}).status_code == 304
        started = time.monotonic()
        assert http.get(path, params={"wait": 1}, headers={"If-None-Match": '"1"'}).status_code == 304
        assert 0.9 < time.monotonic() - started < 15
        later = threading.Timer(0.5, lambda: client.jobs.cancel(job["id"]))
        later.start()
        changed = http.get(path, params={"wait": 30}, headers={"If-None-Match": '"1"'})
        later.join()
        assert changed.json()["status"] == "cancelled" and changed.headers["etag"] == '"2"'
        # Once terminal there is nothing to wait for.
        started = time.monotonic()
        assert http.get(path, params={"wait": 30}, headers={"If-None-Match": '"2"'}).status_code == 304
        assert time.monotonic() - started < 15


def test_events_resume_where_they_were_left(api: Stack, case: Case) -> None:
    with api.client() as client:
        job = upload(client, case).job(client)
        client.jobs.cancel(job["id"])
        assert [event["seq"] for event in client.jobs.stream(job["id"])] == [1, 2]
        assert [event["seq"] for event in client.jobs.stream(job["id"], after=1)] == [2]
        path = f"/v1/jobs/{job['id']}/events/stream"
        assert raw(client).get(path, headers={"Last-Event-ID": "2"}).status_code == 204
        text = raw(client).get(path, headers={"Last-Event-ID": "0"}).text
        assert text.startswith("retry: 2000\n\nid: 1\nevent: state\ndata: {")
        page = raw(client).get(f"/v1/jobs/{job['id']}/events", params={"limit": 1}).json()
        assert page["has_more"] and page["next_cursor"] == "1"
        assert [event["seq"] for event in client.jobs.events(job["id"])] == [1, 2]


def test_the_same_request_is_one_job(api: Stack, case: Case) -> None:
    with api.client() as client:
        uploaded = upload(client, case)
        body = {"model_id": uploaded.model["id"], "dataset_id": uploaded.clean["id"], "defense": {"method": "mcldef", "target": 5}}
        answers = [raw(client).post("/v1/jobs", json=body, headers={"Idempotency-Key": "k1"}) for _ in range(3)]
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, "true", "true"]
        assert answers[0].headers["location"] == f"/v1/jobs/{answers[0].json()['id']}"
        assert len(client.jobs.list()) == 1
        dry = raw(client).post("/v1/jobs", json=body, params={"validate_only": "true"})
        assert dry.status_code == 200 and dry.json()["request"]["defense"]["temperature"] == 0.5
        assert len(client.jobs.list()) == 1


def test_keys_are_shown_once_and_end_at_once(api: Stack) -> None:
    with api.client() as admin:
        made = admin.keys.create(name="ci", scopes=["read"])
        assert made["secret"].startswith("upk_")
        assert all("secret" not in key for key in admin.keys.list())
        with Client(api.url, made["secret"], retries=0) as reader:
            assert raw(reader).get("/v1/me").json()["scopes"] == ["read"]
            assert reader.jobs.list() == []
            with pytest.raises(ApiError) as refusal:
                reader.keys.create(name="more", scopes=["admin"])
            assert refusal.value.code == "insufficient_scope"
            admin.keys.revoke(made["id"])
            with pytest.raises(ApiError) as refusal:
                reader.jobs.list()
            assert refusal.value.code == "unauthenticated"
        expired = admin.keys.create(name="gone", scopes=["read"], expires_in_seconds=0)
        with Client(api.url, expired["secret"], retries=0) as late, pytest.raises(ApiError, match="key_expired"):
            late.jobs.list()


def test_another_tenants_things_do_not_exist(api: Stack, case: Case) -> None:
    with api.client() as owner, api.client(retries=0) as stranger:
        uploaded = upload(owner, case)
        job = uploaded.job(owner)
        key = owner.keys.list()[0]
        begun = raw(owner).post("/v1/uploads", json={"kind": "model", "bytes": 5}).json()
        document = httpx.get(f"{api.url}/openapi.json").json()
        values = {"job_id": job["id"], "upload_id": uploaded.model["id"], "artifact_id": "art_" + "0" * 26, "key_id": key["id"], "name": "nothing"}
        tried = 0
        for path, methods in document["paths"].items():
            if "{" not in path:
                continue
            for method in methods:
                kinds = {"datasets": uploaded.clean["id"], "uploads": begun["id"]}
                real = {**values, "upload_id": kinds.get(path.split("/")[2], values["upload_id"])}
                more: dict[str, Any] = {"headers": {"Upload-Offset": "0"}, "json": {"sha256": "0" * 64} if path.endswith("/complete") else None}
                theirs = raw(stranger).request(method, path.format(**real), **more)
                absent = raw(stranger).request(method, path.format(**{name: value[:-3] + "000" for name, value in real.items()}), **more)
                assert theirs.status_code == absent.status_code == 404, (method, path, theirs.text)
                if method != "head":
                    assert theirs.json()["code"] == absent.json()["code"] == "not_found"
                tried += 1
        assert tried >= 15
        for list_ in (stranger.models, stranger.datasets, stranger.jobs):
            assert list_.list() == []
        with pytest.raises(NotFound):
            stranger.jobs.create(model=uploaded.model, dataset=uploaded.clean, defense={"method": "mcldef"})
        assert owner.jobs.get(job["id"])["status"] == "queued"


def test_deleting_is_refused_while_something_needs_it(api: Stack, case: Case) -> None:
    with api.client(retries=0) as client:
        uploaded = upload(client, case)
        job = uploaded.job(client, measured=True)
        for kind, thing in ((client.models, uploaded.model), (client.datasets, uploaded.clean), (client.datasets, uploaded.test)):
            with pytest.raises(ApiError) as refusal:
                kind.delete(thing["id"])
            assert refusal.value.code == "in_use" and job["id"] in refusal.value.detail
        triggered = client.datasets.upload(case.test, name="with the trigger")
        evaluation = {"dataset_id": uploaded.test["id"], "triggered": {"dataset_id": triggered["id"], "target": 5}}
        measuring = client.jobs.create(model=uploaded.model, defense={"method": "evaluate"}, evaluation=evaluation)
        with pytest.raises(ApiError, match=measuring["id"]):
            client.datasets.delete(triggered["id"])
        client.jobs.cancel(measuring["id"])
        client.jobs.delete(measuring["id"])
        client.datasets.delete(triggered["id"])
        client.jobs.cancel(job["id"])
        for kind, thing in ((client.models, uploaded.model), (client.datasets, uploaded.clean), (client.datasets, uploaded.test)):
            kind.delete(thing["id"])
        with pytest.raises(NotFound):
            client.jobs.retry(job["id"])
        client.jobs.delete(job["id"])
        assert client.jobs.list() == []


def test_large_files_pass_through_little_memory(make_stack: StackMaker, tmp_path: Path) -> None:
    stack = make_stack("laptop")
    process = psutil.Process(stack.start_api().pid)
    size = int(os.environ.get("UNPOISON_TEST_UPLOAD_BYTES", str(400_000_000)))
    np.savez(tmp_path / "big.npz", images=np.random.default_rng(0).integers(0, 256, (size // 3072, 32, 32, 3), dtype=np.uint8))
    with stack.client() as client:
        client.methods.list()
        before, peak, done = process.memory_info().rss, 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        data = client.datasets.upload(tmp_path / "big.npz")
        client.datasets.download(data["id"], tmp_path / "back.npz")
        done.set()
        watcher.join()
        assert data["description"]["count"] == size // 3072
        assert hashlib.sha256((tmp_path / "back.npz").read_bytes()).hexdigest() == data["sha256"]
        assert peak - before < 100_000_000, (before, peak)


def test_an_interrupted_download_resumes(api: Stack, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with api.client() as client:
        model = client.models.upload(case.model)
        asked: list[str | None] = []
        original = httpx.Client.stream

        class Cut(httpx.TransportError):
            pass

        def cut(self: httpx.Client, *args: Any, **options: Any) -> Any:
            asked.append(options["headers"].get("Range"))
            context = original(self, *args, **options)
            if len(asked) > 1:
                return context
            entered = context.__enter__()
            pieces = entered.iter_bytes

            def short(size: int) -> Any:
                yield next(iter(pieces(1000)))
                raise Cut("connection lost")

            entered.iter_bytes = short  # type: ignore[method-assign]

            class Wrapped:
                def __enter__(self) -> Any:
                    return entered

                def __exit__(self, *ignored: Any) -> None:
                    context.__exit__(None, None, None)

            return Wrapped()

        monkeypatch.setattr(httpx.Client, "stream", cut)
        client.models.download(model["id"], tmp_path / "back")
        assert asked == [None, "bytes=1000-"]
        assert (tmp_path / "back").read_bytes() == case.model.read_bytes()
        assert not (tmp_path / "back.partial").exists()


def test_a_damaged_object_never_arrives_as_good(make_stack: StackMaker, case: Case, tmp_path: Path) -> None:
    stack = make_stack("laptop")
    stack.start_api()
    with stack.client(retries=0) as client:
        model = client.models.upload(case.model)
        path = stack.folder / "objects" / "sha256" / model["sha256"][:2] / model["sha256"]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(DigestMismatch):
            client.models.download(model["id"], tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_the_async_client_has_the_same_surface(service: Stack, case: Case, tmp_path: Path) -> None:
    async def go() -> None:
        async with AsyncClient(service.url, service.make_key()) as client:
            uploaded = [await client.models.upload(case.model), await client.datasets.upload(case.clean)]
            job = await client.jobs.create(
                model=uploaded[0], dataset=uploaded[1], defense={"method": "mcldef", "target": 5, "inversion_epochs": 6, "epochs": 3, "epoch_images": 0}
            )
            seen = [event["seq"] async for event in client.jobs.stream(job["id"])]
            job = await client.jobs.wait(job["id"], timeout=60)
            assert job["status"] == "succeeded" and seen == list(range(1, job["version"] + 1))
            artifacts = await client.jobs.artifacts(job["id"])
            await client.artifacts.download(artifacts[0]["id"], tmp_path / "file")
            assert hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest() == artifacts[0]["sha256"]

    asyncio.run(go())


def test_health_and_metrics_need_no_key(api: Stack) -> None:
    assert httpx.get(f"{api.url}/livez").json() == {"status": "ok"}
    ready = httpx.get(f"{api.url}/readyz", timeout=30)
    assert ready.status_code == 200 and ready.json()["checks"]["database"] == "ok"
    assert set(httpx.get(f"{api.url}/version").json()) == {"unpoison", "torch", "api"}
    metrics = httpx.get(f"{api.url}/metrics").text
    assert "unpoison_upload_bytes_total" in metrics and "http_server_request_duration_seconds_bucket" in metrics


def test_an_upload_whose_reader_died_is_read_by_the_next_process(make_stack: StackMaker, case: Case) -> None:
    import sqlalchemy as sa

    from store.tables import Model

    stack = make_stack("laptop")
    stack.start_api()
    with stack.client() as client:
        model = client.models.upload(case.model)
        with stack.database.write() as session:
            session.execute(sa.update(Model).values(status="received", description=None, safe_sha256=None, reading_until=0.0))
        until = time.monotonic() + 20
        while client.models.get(model["id"])["status"] != "ready":
            assert time.monotonic() < until
            time.sleep(0.1)
        assert json.dumps(client.models.get(model["id"])["description"])


def test_the_audit_log_says_who_did_what(api: Stack, case: Case) -> None:
    with api.client(retries=0) as client, api.client(retries=0) as stranger:
        uploaded = upload(client, case)
        job = uploaded.job(client)
        client.jobs.cancel(job["id"])
        raw(client).get(f"/v1/models/{uploaded.model['id']}/content")
        raw(client).get(f"/v1/models/{uploaded.model['id']}")
        client.models.delete(uploaded.model["id"])
        with pytest.raises(NotFound):
            client.models.delete(uploaded.model["id"])
        raw(client).delete("/v1/models/%00%3Cscript%3E" + "x" * 500)
        noted = [(entry["action"], entry["subject"], entry["status"]) for entry in reversed(client.audit.list())]
        model = uploaded.model["id"]
        assert noted == [
            ("upload_model", model, 201),
            ("upload_dataset", uploaded.clean["id"], 201),
            ("upload_dataset", uploaded.test["id"], 201),
            ("create_job", job["id"], 202),
            ("cancel_job", job["id"], 200),
            ("download_model", model, 200),
            ("delete_model", model, 204),
            ("delete_model", model, 404),
            ("delete_model", "", 404),
        ]
        assert {entry["key_id"] for entry in client.audit.list()} == {client.keys.list()[0]["id"]}
        assert stranger.audit.list() == []
        reader = client.keys.create(name="ci", scopes=["read"])["secret"]
        answer = httpx.get(f"{api.url}/v1/audit", headers={"Authorization": f"Bearer {reader}"})
        assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")

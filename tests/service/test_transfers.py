"""Files in parts: cut connections, killed APIs, other tenants, expiry."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from fastapi import Request

from client import ApiError, Client, flows
from client.errors import NotFound
from service.problems import Problem
from service.receiving import receive_part
from store import transfers
from store.objects import Objects
from store.settings import Settings
from store.tables import Object, Transfer, TransferPart
from tests.conftest import Case, StackMaker
from tests.stack import Stack, kill
from worker import sweeper


def big(path: Path, size: int = 1500) -> Path:
    with path.open("wb") as out:
        np.savez(out, images=np.random.default_rng(0).integers(0, 256, (size, 16, 16, 1), dtype=np.uint8), labels=np.arange(size) % 10)
    return path


def begin(http: httpx.Client, path: Path, kind: str = "dataset") -> str:
    answer = http.post("/v1/uploads", json={"kind": kind, "bytes": path.stat().st_size, "filename": path.name, "name": "in parts"})
    assert answer.status_code == 201 and answer.headers["location"] == f"/v1/uploads/{answer.json()['id']}", answer.text
    return str(answer.headers["location"])


def send(http: httpx.Client, where: str, offset: int, data: bytes) -> httpx.Response:
    return http.patch(where, content=data, headers={"Upload-Offset": str(offset), "Content-Type": "application/octet-stream"})


def offset_of(http: httpx.Client, where: str) -> int:
    return int(http.head(where).headers["upload-offset"])


def cut(url: str, headers: dict[str, str], data: bytes, after: int) -> None:
    """Begin a request with all of `data` and close the line after some bytes of it."""
    host, port = url.removeprefix("http://").split("/")[0].split(":")
    lines = [
        f"PATCH /{url.split('/', 3)[3]} HTTP/1.1",
        f"Host: {host}",
        f"Content-Length: {len(data)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    with socket.create_connection((host, int(port))) as line:
        line.sendall("\r\n".join([*lines, "", ""]).encode() + data[:after])
        # Bytes that the server has not looked at when the line breaks are lost, as they may be.
        time.sleep(0.1)
        line.shutdown(socket.SHUT_WR)
        line.settimeout(20)
        while line.recv(4096):
            pass


def test_a_file_cut_twenty_times_arrives_whole(make_stack: StackMaker, tmp_path: Path) -> None:
    stack = make_stack("laptop")
    server = stack.start_api()
    path = big(tmp_path / "big.npz")
    data, chance = path.read_bytes(), random.Random(4)
    headers = {"Authorization": f"Bearer {stack.make_key()}"}
    with httpx.Client(base_url=stack.url, headers=headers, timeout=30) as http:
        where, reached = begin(http, path), []
        for number in range(20):
            at = offset_of(http, where)
            reached.append(at)
            rest = data[at:]
            cut(f"{stack.url}{where}", {**headers, "Upload-Offset": str(at)}, rest, chance.randrange(1, max(len(rest) // 10, 2)))
            if number in (6, 13):
                kill(server)
                server = stack.start_api()
        time.sleep(0.3)
        at = offset_of(http, where)
        assert reached == sorted(reached) and len(set(reached)) >= 5 and 0 < at < len(data)
        assert http.post(f"{where}/complete", json={"sha256": "0" * 64}).json()["code"] == "offset_mismatch"
        assert send(http, where, at, data[at:]).headers["upload-offset"] == str(len(data))
        answer = http.post(f"{where}/complete", json={"sha256": hashlib.sha256(data).hexdigest()})
        assert answer.status_code == 201 and answer.json()["status"] == "ready" and answer.json()["name"] == "in parts", answer.text
        assert answer.json()["sha256"] == hashlib.sha256(data).hexdigest() and answer.json()["description"]["count"] == 1500
        assert http.get(f"/v1/datasets/{answer.json()['id']}/content").content == data
        # Asked again (the answer may have been lost) it is the same data set, and takes no more bytes.
        again = http.post(f"{where}/complete", json={"sha256": hashlib.sha256(data).hexdigest()})
        assert again.json()["id"] == answer.json()["id"] == http.get(where).json()["result_id"]
        assert send(http, where, len(data), b"x").json()["code"] == "offset_mismatch"
        with stack.database.read() as session:
            assert session.scalars(sa.select(TransferPart)).all() == []


def test_parts_that_do_not_fit_are_refused(api: Stack, case: Case, tmp_path: Path) -> None:
    data = case.model.read_bytes()
    with api.client(retries=0) as mine, api.client(retries=0) as other:
        http: Any = mine._transport._http  # type: ignore[attr-defined]
        where = begin(http, case.model, "model")
        wrong = send(http, where, 5, data[5:])
        assert wrong.status_code == 409 and wrong.headers["upload-offset"] == "0" and wrong.json()["code"] == "offset_mismatch"
        assert send(http, where, 0, data + b"x").json()["code"] == "too_large" and offset_of(http, where) == 0
        assert http.patch(where, content=data).json()["code"] == "invalid_parameters"
        assert send(http, where, 0, data[:1000]).status_code == 204
        assert send(http, where, 0, data[:1000]).headers["upload-offset"] == "1000"
        stranger: Any = other._transport._http  # type: ignore[attr-defined]
        for method, path in (("GET", where), ("PATCH", where), ("DELETE", where), ("POST", f"{where}/complete")):
            answer = stranger.request(method, path, headers={"Upload-Offset": "1000"}, json={"sha256": "0" * 64} if method == "POST" else None)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), method
        assert send(http, where, 1000, data[1000:-1] + b"?").status_code == 204
        assert http.post(f"{where}/complete", json={"sha256": hashlib.sha256(data).hexdigest()}).json()["code"] == "digest_mismatch"
        assert http.get(where).status_code == 404, "what cannot become right is forgotten"
        where = begin(http, case.model, "model")
        assert http.delete(where).status_code == 204 and http.get(where).status_code == 404
        assert http.post("/v1/uploads", json={"kind": "model", "bytes": 10**12}).json()["code"] == "too_large"


def test_a_refused_file_is_refused_in_parts_too(api: Stack, tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"I am a model" * 100)
    with api.client(retries=0) as client:
        http: Any = client._transport._http  # type: ignore[attr-defined]
        where = begin(http, tmp_path / "bad.pt", "model")
        send(http, where, 0, (tmp_path / "bad.pt").read_bytes())
        answer = http.post(f"{where}/complete", json={"sha256": hashlib.sha256((tmp_path / "bad.pt").read_bytes()).hexdigest()})
        assert (answer.status_code, answer.json()["code"]) == (422, "unsupported_format")
        assert http.get(where).status_code == 404


class Flaky:
    """A line to a service that breaks after a random number of bytes, a few times."""

    def __init__(self, port: int, breaks: int) -> None:
        self._target, self._left, self._chance = port, breaks, random.Random(1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def left(self) -> int:
        return self._left

    def _serve(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        most = self._chance.randrange(20_000, 150_000) if upwards and self._left else 1 << 40
        try:
            while (piece := source.recv(8192)) and most > 0:
                sink.sendall(piece)
                most -= len(piece)
            if most <= 0:
                self._left -= 1
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flows, "PART", 100_000)
    yield


def test_the_client_goes_on_by_itself(service: Stack, tmp_path: Path, small_parts: None) -> None:
    path = big(tmp_path / "big.npz", 3000)
    line, told = Flaky(service.port, breaks=4), []
    with Client(line.url, service.make_key(), retries=1) as client:
        found = client.datasets.upload(path, progress=lambda sent, total: told.append((sent, total)))
        assert found["status"] == "ready" and found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found["filename"] == "big.npz"
    assert line.left == 0 and told[-1] == (path.stat().st_size, path.stat().st_size)


def test_the_client_gives_up_when_nothing_moves(api: Stack, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "PATIENCE", 1)
    with api.client(retries=0) as client:
        uploads: Any = client._transport._http  # type: ignore[attr-defined]
        path = big(tmp_path / "big.npz")
        original = uploads.request

        def request(**arguments: Any) -> httpx.Response:
            if arguments["method"] == "PATCH":
                raise httpx.ConnectError("gone")
            return original(**arguments)  # type: ignore[no-any-return]

        monkeypatch.setattr(uploads, "request", request)
        with pytest.raises(Exception, match="does not answer"):
            client.datasets.upload(path)


@pytest.fixture
def direct(make_stack: StackMaker, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A service whose S3 server clients reach themselves; parts are small."""
    monkeypatch.setattr(flows, "PART", 100_000)
    stack = make_stack("production", UNPOISON_UPLOAD_ENDPOINT=os.environ["AWS_ENDPOINT_URL"], UNPOISON_UPLOAD_PART_BYTES="100000")
    stack.start_api()
    return stack


def begin_direct(http: httpx.Client, path: Path) -> str:
    answer = http.post("/v1/uploads", json={"kind": "dataset", "bytes": path.stat().st_size, "filename": path.name, "mode": "direct"}).json()
    assert (answer["mode"], answer["part_bytes"], answer["offset"]) == ("direct", 100_000, 0)
    return f"/v1/uploads/{answer['id']}"


def test_large_files_go_straight_to_the_object_store(direct: Stack, tmp_path: Path) -> None:
    path, told = big(tmp_path / "big.npz"), []
    with direct.client(retries=0) as client:
        transport: Any = client._transport
        here, there = [], []
        transport._http.event_hooks["request"].append(lambda request: here.append(request))
        transport._foreign.event_hooks["request"].append(lambda request: there.append(request))
        found = client.datasets.upload(path, progress=lambda sent, total: told.append((sent, total)))
        assert found["status"] == "ready" and found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and found["filename"] == "big.npz"
        assert len(there) == -(-path.stat().st_size // 100_000) and {request.method for request in there} == {"PUT"}
        assert all("authorization" not in request.headers for request in there)
        assert all(int(request.headers.get("content-length", 0)) < 1000 for request in here)
        assert told[-1] == (path.stat().st_size, path.stat().st_size)
        upload = there[0].url.path.split("/")[-2]
        assert direct.objects.parts(upload) == {}, "what was put together is not kept twice"
        assert transport._http.get(f"/v1/uploads/{upload}").json()["result_id"] == found["id"]
        # Parts that come late, to a URL that still works, go with the next tidying; those of an open upload stay.
        where = begin_direct(transport._http, path)
        first = transport._http.post(f"{where}/urls").json()["data"][0]
        kill(direct.processes[0])
        direct.environment["UNPOISON_UPLOAD_ENDPOINT"] = ""
        direct.start_api()
        assert transport._http.post(f"{where}/urls").json()["code"] == "upload_mode"
        for url in (str(there[0].url), first["url"]):
            assert httpx.put(url, content=b"x" * 100_000).status_code == 200
        sweeper.tidy(Settings(data_folder=direct.folder), direct.database, direct.objects)
        assert direct.objects.parts(upload) != {} != direct.objects.parts(where.rsplit("/", 1)[-1]), "a finished upload is known until it expires"
        with direct.database.write() as session:
            session.execute(sa.update(Transfer).values(expires_at=0.0))
        sweeper.tidy(Settings(data_folder=direct.folder), direct.database, direct.objects)
        assert direct.objects.part_owners() == set()


def test_presigned_parts_that_do_not_fit(direct: Stack, tmp_path: Path) -> None:
    path = big(tmp_path / "big.npz", 900)
    data = path.read_bytes()
    with direct.client(retries=0) as client, direct.client(retries=0) as other:
        http: Any = client._transport._http  # type: ignore[attr-defined]
        stranger: Any = other._transport._http  # type: ignore[attr-defined]
        where = begin_direct(http, path)
        urls = http.post(f"{where}/urls").json()
        assert urls["missing"] == len(urls["data"]) == 3 and [part["bytes"] for part in urls["data"]] == [100_000, 100_000, len(data) - 200_000]
        assert "X-Amz-Expires=3600" in urls["data"][0]["url"]
        assert stranger.post(f"{where}/urls").status_code == 404
        reader = Client(direct.url, direct.make_key(scopes=("read",)), retries=0)
        assert reader._transport._http.post(f"{where}/urls").json()["code"] == "insufficient_scope"  # type: ignore[attr-defined]
        reader.close()
        assert send(http, where, 0, data).json()["code"] == "upload_mode"
        proxied = begin(http, path)
        assert http.post(f"{proxied}/urls").json()["code"] == "upload_mode"
        # One part arrives, one is cut short and counts as missing.
        for part, body in ((urls["data"][0], data[:100_000]), (urls["data"][1], data[100_000:150_000])):
            assert httpx.put(part["url"], content=body).status_code == 200
        assert offset_of(http, where) == 100_000 == http.get(where).json()["offset"]
        early = http.post(f"{where}/complete", json={"sha256": hashlib.sha256(data).hexdigest()})
        assert early.json()["code"] == "offset_mismatch" and early.headers["upload-offset"] == "100000"
        again = http.post(f"{where}/urls").json()["data"]
        assert [part["offset"] for part in again] == [100_000, 200_000]
        for part in again:
            httpx.put(part["url"], content=b"?" * part["bytes"])
        assert http.post(f"{where}/urls").json() | {"expires_at": 0} == {"object": "part_urls", "data": [], "missing": 0, "expires_at": 0}
        assert http.post(f"{where}/complete", json={"sha256": hashlib.sha256(data).hexdigest()}).json()["code"] == "digest_mismatch"
        assert http.get(where).status_code == 404 and direct.objects.part_owners() == set()


def test_the_client_asks_again_for_urls(direct: Stack, tmp_path: Path) -> None:
    path = big(tmp_path / "big.npz")
    with direct.client(retries=0) as client:
        foreign: Any = client._transport._foreign  # type: ignore[attr-defined]
        original, asked = foreign.request, []

        def request(**arguments: Any) -> httpx.Response:
            asked.append(arguments["url"])
            if len(asked) == 3:
                raise httpx.ConnectError("gone")
            if len(asked) == 5:
                arguments["url"] = arguments["url"].replace("/unpoison/", "/nothing/")
            return original(**arguments)  # type: ignore[no-any-return]

        foreign.request = request
        assert client.datasets.upload(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert len(asked) == -(-path.stat().st_size // 100_000) + 2


def test_a_store_out_of_reach_is_left_to_the_service(make_stack: StackMaker, s3_server: str, tmp_path: Path, small_parts: None) -> None:
    stack = make_stack("production", UNPOISON_UPLOAD_ENDPOINT="http://127.0.0.1:9", UNPOISON_UPLOAD_PART_BYTES="100000")
    stack.start_api()
    path = big(tmp_path / "big.npz")
    with stack.client(retries=0) as client:
        assert client.datasets.upload(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        with stack.database.read() as session:
            assert [row.part_bytes for row in session.scalars(sa.select(Transfer))] == [None]


def test_a_folder_cannot_sign(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"UNPOISON_UPLOAD_ENDPOINT is set, but the folder .* cannot sign"):
        Objects(f"file://{tmp_path}", "cloud")


def test_abandoned_uploads_are_forgotten(make_stack: StackMaker, case: Case) -> None:
    stack = make_stack("laptop")
    stack.start_api()
    with stack.client(retries=0) as client:
        http: Any = client._transport._http  # type: ignore[attr-defined]
        where = begin(http, case.model, "model")
        assert send(http, where, 0, b"some bytes").status_code == 204
        digest = hashlib.sha256(b"some bytes").hexdigest()
        settings = Settings(data_folder=stack.folder, objects_url=stack.environment["UNPOISON_OBJECTS_URL"])
        sweeper.tidy(settings, stack.database, stack.objects)
        assert stack.objects.exists(digest)
        with stack.database.write() as session:
            session.execute(sa.update(Transfer).values(expires_at=Transfer.expires_at - settings.transfer_seconds))
        assert http.head(where).status_code == 404
        with stack.database.write() as session:
            session.execute(sa.update(Object).values(touched_at=Object.touched_at - 7200))
        sweeper.tidy(settings, stack.database, stack.objects)
        # The rows go first, then nothing holds the bytes.
        sweeper.tidy(settings, stack.database, stack.objects)
        with stack.database.read() as session:
            assert session.scalars(sa.select(Transfer)).all() == [] == session.scalars(sa.select(TransferPart)).all()
        assert not stack.objects.exists(digest)
    with stack.database.read() as session, pytest.raises(Exception, match="may have expired"):
        transfers.get(session, where.rsplit("/", 1)[-1], "nobody")


def test_a_full_disk_keeps_what_had_arrived(make_stack: StackMaker, tmp_path: Path) -> None:
    stack = make_stack("laptop")
    stack.start_api(file_bytes=3_000_000)
    data = os.urandom(5_000_000)
    with stack.client(retries=0) as client:
        http: Any = client._transport._http  # type: ignore[attr-defined]
        (tmp_path / "file").write_bytes(data)
        where = begin(http, tmp_path / "file", "model")
        assert send(http, where, 0, data[:1_500_000]).status_code == 204
        full = send(http, where, 1_500_000, data[1_500_000:])
        assert (full.status_code, full.json()["code"]) == (507, "storage_full")
        assert offset_of(http, where) == 1_500_000
        assert send(http, where, 1_500_000, data[1_500_000:1_600_000]).status_code == 204
        with pytest.raises((NotFound, ApiError)):
            client.models.get("mdl_nothing")


def test_what_a_full_disk_leaves_in_a_buffer_is_no_second_error(tmp_path: Path) -> None:
    async def arrive() -> dict[str, Any]:
        # Less than a file's buffer: it fails when it is flushed, and would again when the file is closed.
        return {"type": "http.request", "body": b"x" * 4000, "more_body": False}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Problem) as refused:
            asyncio.run(receive_part(Request({"type": "http", "headers": []}, arrive), tmp_path, limit=10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.code == "storage_full"
    assert list(tmp_path.iterdir()) == []


def test_a_preview_stores_nothing(api: Stack, case: Case, tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"I am a model" * 100)
    known = api.objects.digests()
    with api.client(retries=0) as client:
        found = client.models.inspect(case.model)
        assert found["object"] == "preview" and found["description"]["architecture"] == "wrn-10-1"
        assert found["sha256"] == hashlib.sha256(case.model.read_bytes()).hexdigest()
        assert client.datasets.inspect(case.clean)["description"]["count"] == 300
        with pytest.raises(ApiError) as refused:
            client.models.inspect(tmp_path / "bad.pt")
        assert (refused.value.code, refused.value.status) == ("unsupported_format", 422)
        assert client.models.list() == client.datasets.list() == []
    assert api.objects.digests() == known
    assert not [path for path in (api.folder / "objects" / "incoming").rglob("*") if path.is_file()]

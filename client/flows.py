"""What the client does, apart from how it waits: generators that yield requests and pauses, driven by either session."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.errors import ApiError, ConnectionFailed, WaitTimeout

Json = dict[str, Any]
Progress = Callable[[int, int], None]
# The larger, the faster; the smaller, the less is sent again when the service itself dies.
PART = 64 << 20
PATIENCE = 8
TERMINAL = frozenset({"succeeded", "failed", "crashed", "cancelled"})


@dataclass(frozen=True)
class Request:
    """One HTTP request; `upload` streams a file (or its `part`: start and length) as the body, `download` writes the answer's body to a file.

    A `path` that is a whole URL belongs to somebody else, who never sees the API key.
    """

    method: str
    path: str
    params: Json = field(default_factory=dict)
    json: Json | None = None
    headers: dict[str, str] = field(default_factory=dict)
    upload: Path | None = None
    part: tuple[int, int] | None = None
    download: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    json: Any


@dataclass(frozen=True)
class Pause:
    """Wait this long, seconds."""

    seconds: float


Flow = Generator[Request | Pause, Answer, Any]


def simple(method: str, path: str, **parts: Any) -> Flow:
    """Send one request and return its JSON. A POST with a body carries an Idempotency-Key, kept across retries."""
    if method == "POST" and path.startswith("/v1/jobs"):
        parts["headers"] = {"Idempotency-Key": uuid.uuid4().hex, **parts.get("headers", {})}
    answer = yield Request(method, path, **parts)
    return answer.json


def upload(kind: str, path: Path, *, name: str | None, resize: int | None, progress: Progress | None, timeout: float) -> Flow:
    """Send a file, in parts if it is large, and wait until the service has read it; return the model or dataset."""
    params = {"filename": path.name, **({"name": name} if name else {})}
    if path.stat().st_size > PART:
        found: Json = yield from in_parts(kind, path, params, resize, progress)
    else:
        query = {**params, **({"resize": resize} if resize else {})}
        found = (yield Request("POST", f"/v1/{kind}", params=query, upload=path, progress=progress)).json
    until = time.monotonic() + timeout
    while found["status"] == "received":
        if time.monotonic() > until:
            raise WaitTimeout(f"{found['id']} is still being read after {timeout:g} s; ask again later")
        yield Pause(1.0)
        found = (yield Request("GET", f"/v1/{kind}/{found['id']}")).json
    return found


def in_parts(kind: str, path: Path, params: Json, resize: int | None, progress: Progress | None) -> Flow:
    """Send a file part by part, straight to the object store if the service signs for it; return the model or dataset as it is then."""
    announced = {"kind": kind.removesuffix("s"), "bytes": path.stat().st_size, **params}
    begun = (yield Request("POST", "/v1/uploads", json={**announced, "mode": "direct"})).json
    where = f"/v1/uploads/{begun['id']}"
    if begun["mode"] == "direct" and not (yield from _to_the_store(where, path, progress)):
        yield Request("DELETE", where)
        begun = (yield Request("POST", "/v1/uploads", json=announced)).json
        where = f"/v1/uploads/{begun['id']}"
    if begun["mode"] == "proxy":
        yield from _through_the_service(where, path, progress)
    sha256 = file_digest(path)
    return (yield Request("POST", f"{where}/complete", json={"sha256": sha256, **({"resize": resize} if resize else {})})).json


def _to_the_store(where: str, path: Path, progress: Progress | None) -> Flow:
    """Send what is missing until nothing is; return False when the store cannot be reached from here."""
    sent, failures = False, 0
    while True:
        asked: Json | None = None
        try:
            asked = (yield Request("POST", f"{where}/urls")).json
            if not asked["data"]:
                return True
            for part in asked["data"]:
                yield Request("PUT", part["url"], upload=path, part=(part["offset"], part["bytes"]), progress=progress)
                sent, failures = True, 0
        except (ConnectionFailed, ApiError) as error:
            failures += 1
            if asked is None and isinstance(error, ApiError):
                raise
            if asked is not None and not sent and failures > 1:
                return False
            if failures > PATIENCE:
                raise
            yield Pause(min(0.2 * 2**failures, 10.0))


def _through_the_service(where: str, path: Path, progress: Progress | None) -> Flow:
    """Send part by part, going on where the service says after every break."""
    size = path.stat().st_size
    offset, failures, lost = 0, 0, False
    while offset < size:
        part = (offset, min(PART, size - offset))
        sending = Request("PATCH", where, headers={"Upload-Offset": str(offset)}, upload=path, part=part, progress=progress)
        try:
            answer = yield Request("HEAD", where) if lost else sending
        except (ConnectionFailed, ApiError) as error:
            failures += 1
            if failures > PATIENCE or (isinstance(error, ApiError) and error.code != "offset_mismatch"):
                raise
            lost = True
            yield Pause(min(0.2 * 2**failures, 10.0))
            continue
        arrived = int(answer.headers["upload-offset"])
        failures, lost, offset = 0 if arrived > offset else failures, False, arrived


def wait(job_id: str, *, timeout: float | None, seen: Callable[[Json], None] | None) -> Flow:
    """Poll with ETag until a job has ended; return it."""
    until = None if timeout is None else time.monotonic() + timeout
    known, pause = "", 0.0
    while True:
        left = 30.0 if until is None else min(30.0, until - time.monotonic())
        if left <= 0:
            raise WaitTimeout(f"job {job_id} has not ended after {timeout:g} s; it goes on")
        headers = {"If-None-Match": known} if known else {}
        answer = yield Request("GET", f"/v1/jobs/{job_id}", params={"wait": round(left, 1)} if known else {}, headers=headers)
        if answer.status != 304:
            known, pause = answer.headers.get("etag", ""), 0.5
            if seen is not None:
                seen(answer.json)
            if answer.json["status"] in TERMINAL:
                return answer.json
        yield Pause(pause)


def pages(path: str, params: Json) -> Flow:
    """Fetch a list page by page; return all its items."""
    items: list[Json] = []
    cursor: Json = {}
    while True:
        page = (yield Request("GET", path, params={**params, **cursor})).json
        items += page["data"]
        if not page["has_more"]:
            return items
        cursor = {"after": page["next_cursor"]}


def file_digest(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

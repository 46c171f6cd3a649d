"""Bodies of any size, to disk: counted, hashed on the way, never whole in memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from service.problems import Problem
from store.objects import NO_SPACE

BLOCK = 4 << 20
STALL_SECONDS = 30.0
MAX_FIELD = 16 << 10
DRAIN, DRAIN_SECONDS = 64 << 20, 5.0


@dataclass
class Received:
    """A body on disk.

    Attributes:
        path: in the folder for incoming files; the receiver adopts or removes it.
        fields: the other fields of a multipart form.
    """

    path: Path
    sha256: str
    bytes: int
    filename: str = ""
    fields: dict[str, str] = field(default_factory=dict)


class _Sink:
    """Writes and hashes blocks in a thread while the next one arrives."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.bytes = 0
        self._limit = limit
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("xb")
        self._waiting: list[bytes] = []
        self._size = 0
        self._task: asyncio.Task[None] | None = None

    async def feed(self, piece: bytes) -> None:
        self.bytes += len(piece)
        if self.bytes > self._limit:
            raise Problem("too_large", f"At most {self._limit} bytes are taken.")
        self._waiting.append(piece)
        self._size += len(piece)
        if self._size >= BLOCK:
            await self._push()

    async def _push(self) -> None:
        if self._task is not None:
            await self._task
        pieces, self._waiting, self._size = self._waiting, [], 0
        self._task = asyncio.create_task(asyncio.to_thread(self._store, pieces))

    def _store(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self._digest.update(piece)
        self._file.writelines(pieces)

    async def close(self) -> str:
        await self._push()
        assert self._task is not None
        await self._task
        await asyncio.to_thread(self._sync)
        return self._digest.hexdigest()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    async def abandon(self) -> None:
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        # What is still buffered has no place on a full disk, and is not wanted.
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)


async def receive(request: Request, folder: Path, *, limit: int) -> Received:
    """Take a raw body or the `file` part of a multipart form.

    Raises `Problem`: `too_large`, `unsupported_media_type`, `malformed_body`, `digest_mismatch`, `storage_full`.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit + (1 << 20):
        await _drain(request)
        raise Problem("too_large", f"The body has {announced} bytes, at most {limit} are taken.")
    kind, options = parse_options_header(request.headers.get("content-type", "application/octet-stream"))
    try:
        sink = _Sink(folder / uuid.uuid4().hex, limit)
    except OSError as error:
        raise _full(error) from error
    try:
        if kind == b"multipart/form-data":
            received = await _multipart(request, sink, options.get(b"boundary", b""))
        elif kind in (b"application/octet-stream", b"application/zip", b"application/x-zip-compressed", b"application/x-pytorch"):
            async for piece in _body(request):
                await sink.feed(piece)
            received = Received(sink.path, "", 0)
        else:
            raise Problem("unsupported_media_type", "Send the file as application/octet-stream, or as `file` of a multipart/form-data form.")
        received.sha256, received.bytes = await sink.close(), sink.bytes
        _check_digest(request, received.sha256)
        if not received.bytes:
            raise Problem("malformed_body", "The body is empty; send the file's bytes.")
    except OSError as error:
        await sink.abandon()
        await _drain(request)
        raise _full(error) from error
    except Problem:
        await sink.abandon()
        await _drain(request)
        raise
    except BaseException:
        await sink.abandon()
        raise
    return received


async def receive_part(request: Request, folder: Path, *, limit: int) -> Received:
    """Take part of a file as the raw body; what has arrived when the client goes away is a shorter part.

    Raises `Problem`: `too_large` for more than `limit` bytes, `storage_full`.
    """
    try:
        sink = _Sink(folder / uuid.uuid4().hex, limit)
    except OSError as error:
        raise _full(error) from error
    try:
        try:
            async for piece in _body(request):
                await sink.feed(piece)
        except ClientDisconnect:
            # The part ends here; the client asks how far it came.
            pass
        except Problem as problem:
            # A line that went silent ends the part as a broken one does.
            if problem.code == "too_large":
                raise
        return Received(sink.path, await sink.close(), sink.bytes)
    except OSError as error:
        await sink.abandon()
        raise _full(error) from error
    except BaseException:
        await sink.abandon()
        raise


async def _drain(request: Request) -> None:
    """Read on for a moment: a client that is still sending when the connection closes never sees the answer."""
    left = DRAIN
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            async for piece in _body(request):
                left -= len(piece)
                if left < 0:
                    return
    except (TimeoutError, Problem, RuntimeError):
        # Nothing more to be polite about: the stream was consumed, or the client is slow.
        return


async def _body(request: Request) -> AsyncIterator[bytes]:
    """Yield the body's pieces; a client that sends nothing for half a minute loses its turn."""
    stream = request.stream().__aiter__()
    while True:
        try:
            yield await asyncio.wait_for(anext(stream), STALL_SECONDS)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise Problem("malformed_body", f"Nothing arrived for {STALL_SECONDS:g} s; send the file again.") from error


async def _multipart(request: Request, sink: _Sink, boundary: bytes) -> Received:
    """Stream the part called `file` into the sink and keep the short fields."""
    if not boundary:
        raise Problem("malformed_body", "The multipart body announces no boundary.")
    found = Received(sink.path, "", 0)
    header: dict[bytes, bytes] = {}
    name, value = bytearray(), bytearray()
    part: dict[str, str] = {}
    pieces: list[bytes] = []
    text = bytearray()
    seen_file = False

    def on_part_begin() -> None:
        header.clear()
        part.clear()
        text.clear()

    def on_header_field(data: bytes, start: int, end: int) -> None:
        name.extend(data[start:end])

    def on_header_value(data: bytes, start: int, end: int) -> None:
        value.extend(data[start:end])
        if len(value) > MAX_FIELD:
            raise Problem("malformed_body", "A header of a part is too long.")

    def on_header_end() -> None:
        header[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def on_headers_finished() -> None:
        nonlocal seen_file
        _, options = parse_options_header(header.get(b"content-disposition", b""))
        part["name"] = options.get(b"name", b"").decode("utf-8", "replace")
        if part["name"] == "file":
            if seen_file:
                raise Problem("malformed_body", "The form has two parts called `file`.")
            seen_file = True
            found.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def on_part_data(data: bytes, start: int, end: int) -> None:
        if part["name"] == "file":
            pieces.append(data[start:end])
            return
        text.extend(data[start:end])
        if len(text) > MAX_FIELD:
            raise Problem("malformed_body", f"Field {part['name']!r} is longer than {MAX_FIELD} bytes.")

    def on_part_end() -> None:
        if part["name"] != "file":
            found.fields[part["name"]] = text.decode("utf-8", "replace")

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": on_part_begin,
            "on_header_field": on_header_field,
            "on_header_value": on_header_value,
            "on_header_end": on_header_end,
            "on_headers_finished": on_headers_finished,
            "on_part_data": on_part_data,
            "on_part_end": on_part_end,
        },
    )
    try:
        async for piece in _body(request):
            parser.write(piece)
            for data in pieces:
                await sink.feed(data)
            pieces.clear()
        parser.finalize()
    except MultipartParseError as error:
        raise Problem("malformed_body", f"The multipart body cannot be read: {error}") from error
    if not seen_file:
        raise Problem("malformed_body", "The form has no part called `file`.")
    return found


def _check_digest(request: Request, sha256: str) -> None:
    """Compare with the client's `Repr-Digest` or `Content-Digest` (RFC 9530), if it sent one."""
    for header in ("repr-digest", "content-digest"):
        for entry in request.headers.get(header, "").split(","):
            algorithm, _, value = entry.strip().partition("=")
            if algorithm == "sha-256" and value.strip(":") != base64.b64encode(bytes.fromhex(sha256)).decode():
                raise Problem("digest_mismatch", f"The bytes that arrived have the sha-256 {sha256}, not the announced one; send them again.")


def _full(error: OSError) -> Exception:
    if error.errno in NO_SPACE:
        return Problem("storage_full", "The upload was not kept because the disk is full; nothing else was harmed.")
    return error

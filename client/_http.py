"""The one place that imports httpx: two thin transports that drive flows, with the same retries."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from client.errors import ConnectionFailed, DigestMismatch, UnpoisonError, from_response
from client.flows import Answer, Flow, Pause, Request, file_digest

RETRYABLE = frozenset({408, 429, 502, 503, 504})
BLOCK = 1 << 20
TIMEOUT = httpx.Timeout(600.0, connect=5.0)


def pause_before_retry(attempt: int, headers: httpx.Headers | None) -> float:
    """Return how long to wait: what the server says (up to two minutes), else 0.5 s doubling to 8 s, with jitter."""
    said = headers.get("retry-after", "") if headers is not None else ""
    if said.isdigit():
        return float(min(int(said), 120))
    return float(min(0.5 * 2**attempt, 8.0) * (0.75 + random.random() / 2))


def _retry(response: httpx.Response) -> bool:
    return response.status_code in RETRYABLE and response.headers.get("x-should-retry") != "false"


def _raise(response: httpx.Response) -> None:
    if response.status_code >= 400:
        try:
            problem = response.json()
        except ValueError:
            problem = {"detail": response.text[:500] or f"HTTP {response.status_code}"}
        raise from_response(response.status_code, problem if isinstance(problem, dict) else {})


def _answer(response: httpx.Response) -> Answer:
    _raise(response)
    kind = response.headers.get("content-type", "")
    return Answer(response.status_code, dict(response.headers), response.json() if response.content and "json" in kind else None)


def _pieces(request: Request) -> Iterator[bytes]:
    assert request.upload is not None
    total = request.upload.stat().st_size
    sent, left = request.part or (0, total)
    with request.upload.open("rb") as file:
        file.seek(sent)
        while left and (piece := file.read(min(BLOCK, left))):
            yield piece
            sent += len(piece)
            left -= len(piece)
            if request.progress is not None:
                request.progress(sent, total)


async def _async_pieces(request: Request) -> AsyncIterator[bytes]:
    for piece in _pieces(request):
        yield piece


def _arguments(request: Request) -> dict[str, Any]:
    headers = dict(request.headers)
    if request.upload is not None:
        length = request.part[1] if request.part else request.upload.stat().st_size
        headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(length)}
    return {"method": request.method, "url": request.path, "params": request.params or None, "json": request.json, "headers": headers}


def _host(http: httpx.Client | httpx.AsyncClient, request: Request) -> str:
    """Return whom a request went to, without what a signed URL must not tell."""
    url = http.base_url.join(request.path)
    return f"{url.scheme}://{url.netloc.decode()}"


class _Download:
    """Where a download stands: bytes on disk, the version they belong to."""

    def __init__(self, request: Request) -> None:
        assert request.download is not None
        self.target = request.download
        self.partial = request.download.with_name(request.download.name + ".partial")
        self.partial.unlink(missing_ok=True)
        self.etag = ""
        self._progress = request.progress

    def headers(self) -> dict[str, str]:
        done = self.partial.stat().st_size if self.partial.exists() else 0
        return {"Range": f"bytes={done}-", "If-Range": self.etag} if done and self.etag else {}

    def begin(self, response: httpx.Response) -> tuple[str, int]:
        self.etag = response.headers.get("etag", "")
        length = int(response.headers.get("content-length", 0))
        if response.status_code == 206:
            return "ab", length + self.partial.stat().st_size
        return "wb", length

    def told(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)

    def finish(self, response: httpx.Response) -> None:
        said = response.headers.get("repr-digest", "")
        if said.startswith("sha-256=:"):
            wanted = base64.b64decode(said[9:].rstrip(":")).hex()
            found = file_digest(self.partial)
            if found != wanted:
                self.partial.unlink()
                raise DigestMismatch(f"{self.target.name} arrived with sha256 {found} instead of {wanted}; download it again")
        self.partial.replace(self.target)


class SyncTransport:
    """Drives flows with blocking calls."""

    def __init__(self, url: str, api_key: str, retries: int) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=TIMEOUT)
        self._foreign = httpx.Client(timeout=TIMEOUT)
        self._retries = retries

    def drive(self, flow: Flow) -> Any:
        """Run a flow to its end and return its value."""
        try:
            step = next(flow)
            while True:
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                    step = next(flow)
                    continue
                try:
                    answer = self._send(step)
                except UnpoisonError as error:
                    # A flow may know how to go on; one that does not lets the error through.
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as end:
            return end.value

    def _send(self, request: Request) -> Answer:
        download = _Download(request) if request.download is not None else None
        http = self._http if request.path.startswith("/") else self._foreign
        for attempt in range(self._retries + 1):
            headers: httpx.Headers | None = None
            try:
                if download is not None:
                    return self._fetch(request, download)
                content = _pieces(request) if request.upload is not None else None
                response = http.request(**_arguments(request), content=content)
                if attempt == self._retries or not _retry(response):
                    return _answer(response)
                headers = response.headers
            except httpx.TransportError as error:
                if attempt == self._retries:
                    raise ConnectionFailed(f"{_host(http, request)} does not answer: {error}") from error
            time.sleep(pause_before_retry(attempt, headers))
        raise AssertionError

    def _fetch(self, request: Request, download: _Download) -> Answer:
        arguments = _arguments(request)
        arguments["headers"] |= download.headers()
        with self._http.stream(**arguments) as response:
            if response.status_code >= 400:
                response.read()
                _raise(response)
            mode, total = download.begin(response)
            with download.partial.open(mode) as out:
                for piece in response.iter_bytes(BLOCK):
                    out.write(piece)
                    download.told(out.tell(), total)
        download.finish(response)
        return Answer(response.status_code, dict(response.headers), None)

    def events(self, path: str, after: int) -> Iterator[dict[str, Any]]:
        """Yield a job's events as they happen, reconnecting with the last one seen."""
        failures = 0
        while True:
            try:
                with self._http.stream("GET", path, headers={"Last-Event-ID": str(after)}) as response:
                    if response.status_code == 204:
                        return
                    if response.status_code >= 400:
                        response.read()
                        _raise(response)
                    for line in response.iter_lines():
                        if line.startswith("data: "):
                            event: dict[str, Any] = json.loads(line[6:])
                            after, failures = event["seq"], 0
                            yield event
            except httpx.TransportError as error:
                failures += 1
                if failures > self._retries:
                    raise ConnectionFailed(f"{self._http.base_url} does not answer: {error}") from error
                time.sleep(pause_before_retry(failures, None))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._foreign.close()


class AsyncTransport:
    """Drives flows with awaits."""

    def __init__(self, url: str, api_key: str, retries: int) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=TIMEOUT)
        self._foreign = httpx.AsyncClient(timeout=TIMEOUT)
        self._retries = retries

    async def drive(self, flow: Flow) -> Any:
        """Run a flow to its end and return its value."""
        try:
            step = next(flow)
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = next(flow)
                    continue
                try:
                    answer = await self._send(step)
                except UnpoisonError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as end:
            return end.value

    async def _send(self, request: Request) -> Answer:
        download = _Download(request) if request.download is not None else None
        http = self._http if request.path.startswith("/") else self._foreign
        for attempt in range(self._retries + 1):
            headers: httpx.Headers | None = None
            try:
                if download is not None:
                    return await self._fetch(request, download)
                content = _async_pieces(request) if request.upload is not None else None
                response = await http.request(**_arguments(request), content=content)
                if attempt == self._retries or not _retry(response):
                    return _answer(response)
                headers = response.headers
            except httpx.TransportError as error:
                if attempt == self._retries:
                    raise ConnectionFailed(f"{_host(http, request)} does not answer: {error}") from error
            await asyncio.sleep(pause_before_retry(attempt, headers))
        raise AssertionError

    async def _fetch(self, request: Request, download: _Download) -> Answer:
        arguments = _arguments(request)
        arguments["headers"] |= download.headers()
        async with self._http.stream(**arguments) as response:
            if response.status_code >= 400:
                await response.aread()
                _raise(response)
            mode, total = download.begin(response)
            with download.partial.open(mode) as out:
                async for piece in response.aiter_bytes(BLOCK):
                    out.write(piece)
                    download.told(out.tell(), total)
        download.finish(response)
        return Answer(response.status_code, dict(response.headers), None)

    async def events(self, path: str, after: int) -> AsyncIterator[dict[str, Any]]:
        """Yield a job's events as they happen, reconnecting with the last one seen."""
        failures = 0
        while True:
            try:
                async with self._http.stream("GET", path, headers={"Last-Event-ID": str(after)}) as response:
                    if response.status_code == 204:
                        return
                    if response.status_code >= 400:
                        await response.aread()
                        _raise(response)
                    async for line in response.aiter_lines():
                        if line.startswith("data: "):
                            event: dict[str, Any] = json.loads(line[6:])
                            after, failures = event["seq"], 0
                            yield event
            except httpx.TransportError as error:
                failures += 1
                if failures > self._retries:
                    raise ConnectionFailed(f"{self._http.base_url} does not answer: {error}") from error
                await asyncio.sleep(pause_before_retry(failures, None))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
        await self._foreign.aclose()

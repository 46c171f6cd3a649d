"""The application: routes, problems, request ids, access log, metrics."""

from __future__ import annotations

import asyncio
import importlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import Counter, Histogram

from service import problems, schemas
from service.api import audit as audit_routes
from service.api import health, jobs, keys, methods, transfers, uploads
from service.context import Caller, Context
from service.reading import Reader
from store import audit, ids, queue
from store.database import Database
from store.errors import StoreError
from store.objects import Objects
from store.settings import Settings
from store.tables import Dataset, Model

logger = structlog.get_logger()
DURATION = Histogram("http_server_request_duration_seconds", "Time until the response began.", ["method", "status"])
RECEIVED = Counter("unpoison_upload_bytes_total", "Bytes of request bodies.")
# Reading is not noted, taking away is.
DOWNLOADS = frozenset({"download_model", "download_dataset", "download_artifact", "get_report"})
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]


def create_app(settings: Settings) -> FastAPI:
    """Return the application on these floors; the schema is brought to the newest migration first."""
    database = Database(settings.database)
    database.migrate()
    objects = Objects(settings.objects, settings.upload_endpoint)
    reader = Reader(settings, database, objects)
    opened = Context(settings, database, objects, queue.app(settings.queue), reader)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        takeover = asyncio.create_task(reader.take_over())
        # It takes two seconds, which the first ResNet to arrive would wait for.
        warm = asyncio.create_task(asyncio.to_thread(importlib.import_module, "torchvision"))
        yield
        await warm
        takeover.cancel()
        database.engine.dispose()

    app = FastAPI(title="unpoison", version=version("unpoison"), lifespan=lifespan, description="Remove backdoors from models and data sets.")
    app.state.context = opened
    app.include_router(uploads.routes(Model, schemas.Model))
    app.include_router(uploads.routes(Dataset, schemas.Dataset))
    for router in (transfers.router, methods.router, jobs.router, keys.router, audit_routes.router, health.router):
        app.include_router(router)
    problems.install(app)
    app.add_middleware(Audit, opened=opened)
    app.add_middleware(RequestIds)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document; every validation error is a problem, not FastAPI's own shape."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        parts = document["components"]["schemas"]
        parts.pop("HTTPValidationError", None)
        parts.pop("ValidationError", None)
        shape = schemas.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= shape.pop("$defs", {})
        parts["Problem"] = shape
        app.openapi_schema = document
    return app.openapi_schema


class Audit:
    """Notes who changed or took away what, before the answer leaves; plain ASGI, inside of `RequestIds`.

    Before, so that whoever has an answer finds its deed in the log, and deeds that followed one another stand in that order.
    """

    def __init__(self, app: Any, opened: Context) -> None:
        self._app, self._opened = app, opened

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        """Handle one connection."""
        answer: Message = {}

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.update(message)
                await self._note(scope, answer)
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            # A caller who went away before the answer may have done something all the same.
            if not answer:
                await self._note(scope, answer)

    async def _note(self, scope: Scope, answer: Message) -> None:
        caller = scope.get("state", {}).get("caller")
        action = getattr(scope.get("route"), "operation_id", None)
        if caller is not None and action and (scope["method"] not in ("GET", "HEAD") or action in DOWNLOADS):
            await asyncio.to_thread(self._write, scope, caller, action, answer)

    def _write(self, scope: Scope, caller: Caller, action: str, answer: Message) -> None:
        headers = {name.lower(): value for name, value in answer.get("headers", ())}
        made = headers.get(b"location", b"").decode("latin-1").rsplit("/", 1)[-1]
        # What a stranger wrote into the path is noted only if it could be an id.
        named = [str(value) for value in scope.get("path_params", {}).values()]
        subject = next((one for one in [*named, made] if ids.PATTERN.fullmatch(one)), "")
        try:
            with self._opened.database.write() as session:
                audit.note(
                    session, tenant=caller.tenant, key_id=caller.key_id, action=action, subject=subject, status=answer.get("status", 0),
                    request_id=scope["state"].get("request_id", ""), address=(scope.get("client") or ("",))[0],
                )  # fmt: skip
        except StoreError as error:
            # The deed is done and its answer stands; what is lost here must at least be in the process's log.
            logger.error("not in the audit log", action=action, subject=subject, key_id=caller.key_id, error=error.detail)


class RequestIds:
    """Gives every request an id, logs it, and times it; plain ASGI, so that bodies stream through untouched."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()

        async def counted() -> Message:
            message = await receive()
            RECEIVED.inc(len(message.get("body", b"")))
            return message

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"request-id", request_id.encode())]
                seconds = time.perf_counter() - started
                DURATION.labels(scope["method"], message["status"]).observe(seconds)
                if message["status"] >= 500 or scope["method"] not in ("GET", "HEAD"):
                    logger.info(
                        "request", method=scope["method"], path=scope["path"], status=message["status"], seconds=round(seconds, 4), request_id=request_id
                    )
            await send(message)

        await self._app(scope, counted, tagged)

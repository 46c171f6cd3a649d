"""The application: routes, problems, request ids, access log, metrics."""

from __future__ import annotations

import asyncio
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
from service.api import health, jobs, keys, methods, transfers, uploads
from service.context import Context
from service.reading import Reader
from store import queue
from store.database import Database
from store.objects import Objects
from store.settings import Settings
from store.tables import Dataset, Model

logger = structlog.get_logger()
DURATION = Histogram("http_server_request_duration_seconds", "Time until the response began.", ["method", "status"])
RECEIVED = Counter("unpoison_upload_bytes_total", "Bytes of request bodies.")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]


def create_app(settings: Settings) -> FastAPI:
    """Return the application on these floors; the schema is brought to the newest migration first."""
    database = Database(settings.database)
    database.migrate()
    objects = Objects(settings.objects)
    reader = Reader(settings, database, objects)
    opened = Context(settings, database, objects, queue.app(settings.queue), reader)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        takeover = asyncio.create_task(reader.take_over())
        yield
        takeover.cancel()
        database.engine.dispose()

    app = FastAPI(title="unpoison", version=version("unpoison"), lifespan=lifespan, description="Remove backdoors from models and data sets.")
    app.state.context = opened
    app.include_router(uploads.routes(Model, schemas.Model))
    app.include_router(uploads.routes(Dataset, schemas.Dataset))
    for router in (transfers.router, methods.router, jobs.router, keys.router, health.router):
        app.include_router(router)
    problems.install(app)
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

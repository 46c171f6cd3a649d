"""`/v1/models` and `/v1/datasets`: the same routes for both kinds of upload."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Query, Request, Response

from service import blobs, problems, schemas
from service.context import Caller, Context, Opened, Reading, Writing
from service.lists import After, Limit, Order, linked
from service.problems import Problem, documented
from service.receiving import Received, receive
from store import library, quotas
from store.errors import QuotaExceeded
from store.tables import Dataset, Model

FILE = {"type": "string", "format": "binary", "minLength": 1}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": FILE},
            "multipart/form-data": {"schema": {"type": "object", "properties": {"file": FILE, "name": {"type": "string"}}, "required": ["file"]}},
        },
    }
}
UPLOAD_CODES = (
    "malformed_body", "quota_exceeded", "too_large", "unsupported_media_type", "digest_mismatch", "unsafe_file", "unsupported_format", "damaged_file",
    "weights_not_finite", "architecture_unknown", "architecture_mismatch", "dataset_invalid", "storage_full",
)  # fmt: skip
DESCRIPTION = (
    "Send the file as the raw body (`application/octet-stream`) or as `file` of a form. The answer waits a while for the file to be "
    "read; if that takes longer the status is `received`: ask again until it is `ready` or `rejected`."
)
DOWNLOAD = {200: {"content": {"application/octet-stream": {"schema": FILE}}}, 206: {"description": "The part asked for."}, 304: {"description": "Unchanged."}}


def routes(table: type[Model] | type[Dataset], shape: Any) -> APIRouter:
    """Return the router of one kind of upload."""
    word = table.__tablename__
    router = APIRouter(prefix=f"/v1/{word}s", tags=[f"{word}s"])

    @router.post(
        "", status_code=201, response_model=shape | schemas.Preview, responses={200: {"model": schemas.Preview}, **documented(*UPLOAD_CODES)},
        openapi_extra=BODY, operation_id=f"upload_{word}",
        summary=f"Upload a {word}", description=DESCRIPTION,
    )  # fmt: skip
    async def upload(
        request: Request,
        response: Response,
        opened: Opened,
        caller: Writing,
        name: Annotated[schemas.NoNul, Query(description="What to call it.")] = "",
        filename: Annotated[schemas.NoNul, Query(description="The file's name, for giving it back.")] = "",
        validate_only: Annotated[bool, Query(description="Only say what the file is (200, a preview) or why it would be refused; store nothing.")] = False,
        resize: schemas.Resize = None,
    ) -> Any:
        announced = request.headers.get("content-length", "")
        await asyncio.to_thread(_allowed, opened, caller, int(announced) if announced.isdigit() else 0)
        folder = opened.objects.incoming(opened.settings.scratch)
        started = time.perf_counter()
        received = await receive(request, folder, limit=opened.settings.max_upload_bytes)
        try:
            # Again with what has really arrived: a body need not say how long it is.
            await asyncio.to_thread(_allowed, opened, caller, received.bytes)
        except QuotaExceeded:
            received.path.unlink(missing_ok=True)
            raise
        received.filename = basename(filename or received.filename) or word
        if resize is not None and table is Model:
            received.path.unlink(missing_ok=True)
            raise Problem("invalid_parameters", "Only pictures are resized. Leave `resize` out for a model.")
        if validate_only:
            return await preview(opened, table, response, received, resize)
        return await admit(opened, caller, table, shape, response, received, name or received.fields.get("name", ""), started, resize)

    @router.get("", response_model=schemas.Page[shape], responses=documented("not_found"), operation_id=f"list_{word}s", summary=f"List {word}s")
    def listing(request: Request, response: Response, opened: Opened, caller: Reading, limit: Limit = 20, after: After = None, order: Order = "desc") -> Any:
        with opened.database.read() as session:
            rows, cursor = library.page(session, table, caller.tenant, limit=limit, after=after, newest_first=order == "desc")
        return linked(request, response, [shape.of(row) for row in rows], cursor)

    @router.get("/{upload_id}", response_model=shape, responses=documented("not_found"), operation_id=f"get_{word}", summary=f"Get a {word}")
    def get(upload_id: str, response: Response, opened: Opened, caller: Reading) -> Any:
        response.headers["Cache-Control"] = "no-store"
        return shape.of(_get(opened, caller, table, upload_id))

    @router.delete("/{upload_id}", status_code=204, responses=documented("not_found", "in_use"), operation_id=f"delete_{word}", summary=f"Delete a {word}")
    def delete(upload_id: str, opened: Opened, caller: Writing) -> None:
        with opened.database.write() as session:
            library.delete(session, table, upload_id, caller.tenant)  # type: ignore[type-var]

    @router.head(
        "/{upload_id}/content", response_class=Response, responses={**documented("not_found", "range_not_satisfiable"), **DOWNLOAD},  # type: ignore[dict-item]
        operation_id=f"head_{word}", summary=f"Ask about a {word}'s file",
    )  # fmt: skip
    @router.get(
        "/{upload_id}/content", response_class=Response, responses={**documented("not_found", "range_not_satisfiable"), **DOWNLOAD},  # type: ignore[dict-item]
        operation_id=f"download_{word}", summary=f"Download a {word} as it was uploaded",
    )  # fmt: skip
    def content(upload_id: str, request: Request, opened: Opened, caller: Reading) -> Response:
        row = _get(opened, caller, table, upload_id)
        return blobs.blob(
            request, opened.objects, sha256=row.sha256, size=row.bytes, filename=row.filename, media_type="application/octet-stream", created_at=row.created_at
        )

    return router


async def preview(opened: Context, table: Any, response: Response, received: Received, resize: int | None) -> Any:
    """Have a received file read and forget it; raises `Problem` with the reader's refusal."""
    try:
        description, refusal = await opened.reader.preview(table, received.path, resize)
    finally:
        received.path.unlink(missing_ok=True)
    if refusal is not None:
        raise _refused(refusal)
    response.status_code = 200
    response.headers["Cache-Control"] = "no-store"
    return schemas.Preview(filename=received.filename, bytes=received.bytes, sha256=received.sha256, description=description or {})


def _refused(refusal: dict[str, Any], **headers: str) -> Problem:
    code = refusal["code"] if refusal["code"] in problems.CATALOGUE else "unsafe_file"
    return Problem(code, f"{refusal['message']}. {refusal['advice']}", headers=headers)


async def admit(
    opened: Context, caller: Caller, table: Any, shape: Any, response: Response, received: Received, name: str, started: float, resize: int | None
) -> Any:
    """Store a received file, have it read, and answer with the model or dataset; raises `Problem` with the reader's refusal."""
    word = table.__tablename__
    row = await asyncio.to_thread(_keep, opened, caller, table, received, name or received.filename, resize)
    stored = time.perf_counter()
    await opened.reader.read(table, row.id, row.sha256, resize)
    row = await asyncio.to_thread(_get, opened, caller, table, row.id)
    if row.status == library.REJECTED:
        raise _refused(row.refusal or {}, Location=f"/v1/{word}s/{row.id}")
    response.headers["Server-Timing"] = f"receive;dur={1000 * (stored - started):.1f}, read;dur={1000 * (time.perf_counter() - stored):.1f}"
    response.headers["Location"] = f"/v1/{word}s/{row.id}"
    response.headers["Cache-Control"] = "no-store"
    return shape.of(row)


def store_bytes(opened: Context, received: Received) -> None:
    """Move a received file into the object store; the object is touched first so that no sweep takes it in between."""
    try:
        with opened.database.write() as session:
            library.touch(session, received.sha256, received.bytes)
        opened.objects.adopt(received.path, received.sha256)
    finally:
        received.path.unlink(missing_ok=True)


def _keep(opened: Context, caller: Caller, table: Any, received: Received, name: str, resize: int | None) -> Any:
    """Store the bytes, then the row."""
    store_bytes(opened, received)
    with opened.database.write() as session:
        return library.add(
            session, table, tenant=caller.tenant, name=_printable(name)[:200], filename=received.filename, sha256=received.sha256,
            size=received.bytes, labels={}, reading_seconds=opened.reader.patience, resize=resize,
        )  # fmt: skip


def _allowed(opened: Context, caller: Caller, size: int) -> None:
    with opened.database.read() as session:
        quotas.check_upload(session, opened.settings, caller.tenant, size)


def _get(opened: Context, caller: Caller, table: Any, upload_id: str) -> Any:
    with opened.database.read() as session:
        return library.get(session, table, upload_id, caller.tenant)


def basename(filename: str) -> str:
    """Return the last part of a file's name, printable."""
    return _printable(unquote(filename).replace("\\", "/").rsplit("/", 1)[-1])[:255]


def _printable(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable())

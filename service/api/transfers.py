"""`/v1/uploads`: a file in parts, for what is too large or a line too shaky for one request."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from service import schemas
from service.api.uploads import FILE, UPLOAD_CODES, admit, basename, store_bytes
from service.context import Caller, Context, Opened, Reading, Writing
from service.problems import Problem, documented
from service.receiving import Received, receive_part
from store import jobs, library, quotas, transfers
from store.errors import OffsetMismatch
from store.objects import CHUNK
from store.tables import Dataset, Model

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])
# S3 takes no more parts of a file; ours are objects of their own, but a list of more helps nobody.
MOST_PARTS = 10_000
# As many URLs as a client uses up before they expire, even over a slow line.
URLS, URL_SECONDS = 16, 3600.0
KINDS: dict[str, Any] = {"model": (Model, schemas.Model), "dataset": (Dataset, schemas.Dataset)}
BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": FILE}}}}
Offset = Annotated[int, Header(alias="Upload-Offset", ge=0, le=2**53 - 1, description="Where this part begins.")]


@router.post(
    "", status_code=201, response_model=schemas.Transfer, responses=documented("malformed_body", "quota_exceeded", "too_large"), operation_id="begin_upload",
    summary="Announce a file that arrives in parts",
)  # fmt: skip
def begin(body: schemas.NewTransfer, response: Response, opened: Opened, caller: Writing) -> Any:
    """Announce a file; then PATCH its parts (or, if `mode` is `direct`, PUT them to the URLs of `…/urls`), and complete it."""
    if body.bytes > opened.settings.max_upload_bytes:
        raise Problem("too_large", f"The file has {body.bytes} bytes, at most {opened.settings.max_upload_bytes} are taken.")
    filename = basename(body.filename) or body.kind
    direct = body.mode == "direct" and opened.objects.signs
    part_bytes = max(opened.settings.upload_part_bytes, -(-body.bytes // MOST_PARTS)) if direct else None
    with opened.database.write() as session:
        quotas.check_upload(session, opened.settings, caller.tenant, body.bytes)
        row = transfers.begin(
            session, tenant=caller.tenant, kind=body.kind, name=body.name, filename=filename, size=body.bytes, part_bytes=part_bytes,
            seconds=opened.settings.transfer_seconds,
        )  # fmt: skip
        response.headers["Location"] = f"/v1/uploads/{row.id}"
        return schemas.Transfer.of(row, 0)


@router.head("/{upload_id}", response_class=Response, responses=documented("not_found"), operation_id="head_upload", summary="Ask how far an upload is")
def ask(upload_id: str, opened: Opened, caller: Reading) -> Response:
    """Say where the next part begins, in `Upload-Offset`."""
    row = _get(opened, caller, upload_id)
    return Response(headers={"Upload-Offset": str(_arrived(opened, row)), "Upload-Length": str(row.bytes), "Cache-Control": "no-store"})


@router.get("/{upload_id}", response_model=schemas.Transfer, responses=documented("not_found"), operation_id="get_upload", summary="Get an upload")
def get(upload_id: str, opened: Opened, caller: Reading) -> Any:
    """Return an upload in parts."""
    row = _get(opened, caller, upload_id)
    return schemas.Transfer.of(row, _arrived(opened, row))


@router.post(
    "/{upload_id}/urls", response_model=schemas.PartUrls, responses=documented("not_found", "upload_mode"), operation_id="sign_upload",
    summary="Get URLs for missing parts",
)  # fmt: skip
def sign(upload_id: str, opened: Opened, caller: Writing) -> Any:
    """Return presigned URLs of the object store for the first parts that are missing. PUT each part's bytes to its URL, then ask again until there is none."""
    with opened.database.write() as session:
        row = transfers.renew(session, upload_id, caller.tenant, seconds=opened.settings.transfer_seconds)
        if row.part_bytes is None:
            raise Problem("upload_mode", "This upload's parts come here: PATCH them. Begin one with `mode: direct` for URLs of the object store.")
        if not opened.objects.signs:
            raise Problem("upload_mode", "This service has stopped signing URLs; delete the upload and begin it again.")
        until = jobs.moment(session) + URL_SECONDS
    missing = [] if row.result_id is not None else transfers.missing(row, opened.objects.parts(row.id))
    urls = [schemas.PartUrl(offset=offset, bytes=size, url=opened.objects.sign_part(row.id, offset, URL_SECONDS)) for offset, size in missing[:URLS]]
    return schemas.PartUrls(data=urls, missing=len(missing), expires_at=until)


@router.patch(
    "/{upload_id}", status_code=204, responses=documented("malformed_body", "not_found", "offset_mismatch", "too_large", "storage_full", "upload_mode"), openapi_extra=BODY,
    operation_id="append_upload", summary="Send a part",
)  # fmt: skip
async def append(upload_id: str, request: Request, opened: Opened, caller: Writing, upload_offset: Offset) -> Response:
    """Add bytes at `Upload-Offset`. If the connection breaks, what had arrived is kept: ask for the offset and go on there."""
    row = await asyncio.to_thread(_get, opened, caller, upload_id)
    if row.part_bytes is not None:
        raise Problem("upload_mode", "This upload's parts go to the URLs of `…/urls`, not here.")
    if row.offset != upload_offset or row.result_id is not None:
        raise OffsetMismatch(f"the upload goes on at byte {row.offset}, not at {upload_offset}", row.offset)
    received = await receive_part(request, opened.objects.incoming(opened.settings.scratch), limit=row.bytes - row.offset)
    if not received.bytes:
        received.path.unlink(missing_ok=True)
        raise Problem("malformed_body", "The part is empty; send bytes that begin at the offset.")
    offset = await asyncio.to_thread(_add, opened, caller, upload_id, upload_offset, received)
    return Response(status_code=204, headers={"Upload-Offset": str(offset)})


@router.post(
    "/{upload_id}/complete", status_code=201, response_model=schemas.Model | schemas.Dataset, responses=documented("not_found", "offset_mismatch", *UPLOAD_CODES),
    operation_id="complete_upload", summary="Complete an upload",
)  # fmt: skip
async def complete(upload_id: str, body: schemas.Completion, response: Response, opened: Opened, caller: Writing) -> Any:
    """Put the parts together, verify them, and read the file as a whole upload would be."""
    row = await asyncio.to_thread(_get, opened, caller, upload_id)
    table, shape = KINDS[row.kind]
    if row.result_id is not None:
        return await asyncio.to_thread(_result, opened, caller, row)
    if body.resize is not None and table is Model:
        raise Problem("invalid_parameters", "Only pictures are resized. Leave `resize` out for a model.")
    started = time.perf_counter()
    received = await asyncio.to_thread(_join, opened, caller, upload_id)
    if received.sha256 != body.sha256:
        received.path.unlink(missing_ok=True)
        await asyncio.to_thread(delete, upload_id, opened, caller)
        raise Problem("digest_mismatch", f"The parts add up to the sha-256 {received.sha256}, not to {body.sha256}; send the file again.")
    try:
        found = await admit(opened, caller, table, shape, response, received, row.name, started, body.resize)
    except Problem:
        # The reader refused it: no more bytes can make it right, and as long as it is there it counts against the quota.
        await asyncio.to_thread(delete, upload_id, opened, caller)
        raise
    await asyncio.to_thread(_completed, opened, caller, upload_id, found.id)
    return found


@router.delete("/{upload_id}", status_code=204, responses=documented("not_found"), operation_id="delete_upload", summary="Forget an upload")
def delete(upload_id: str, opened: Opened, caller: Writing) -> None:
    """Forget an upload in parts; a model or dataset it became stays."""
    with opened.database.write() as session:
        transfers.delete(session, upload_id, caller.tenant)
    if opened.objects.signs:
        opened.objects.forget_parts(upload_id)


def _arrived(opened: Context, row: Any) -> int:
    """Return how many bytes of a file are kept."""
    if row.part_bytes is None or row.result_id is not None:
        return int(row.offset if row.part_bytes is None else row.bytes)
    return int(row.bytes - sum(size for _, size in transfers.missing(row, opened.objects.parts(row.id))))


def _get(opened: Context, caller: Caller, upload_id: str) -> Any:
    with opened.database.read() as session:
        return transfers.get(session, upload_id, caller.tenant)


def _result(opened: Context, caller: Caller, row: Any) -> Any:
    table, shape = KINDS[row.kind]
    with opened.database.read() as session:
        return shape.of(library.get(session, table, row.result_id, caller.tenant))


def _completed(opened: Context, caller: Caller, upload_id: str, found: str) -> None:
    with opened.database.write() as session:
        transfers.complete(session, upload_id, caller.tenant, found)
    if opened.objects.signs:
        opened.objects.forget_parts(upload_id)


def _add(opened: Context, caller: Caller, upload_id: str, offset: int, received: Received) -> int:
    """Store a part's bytes, then its row."""
    store_bytes(opened, received)
    with opened.database.write() as session:
        return transfers.append(
            session, upload_id, caller.tenant, offset=offset, size=received.bytes, sha256=received.sha256, seconds=opened.settings.transfer_seconds
        )  # fmt: skip


def _join(opened: Context, caller: Caller, upload_id: str) -> Received:
    """Write the parts one after the other into one file, hashed on the way."""
    with opened.database.read() as session:
        row = transfers.get(session, upload_id, caller.tenant)
        parts = [part.sha256 for part in transfers.parts(session, row)] if row.part_bytes is None else []
    offsets = [] if row.part_bytes is None else _all_offsets(opened, row)
    folder = opened.objects.incoming(opened.settings.scratch) / uuid.uuid4().hex
    folder.mkdir()
    whole = folder.with_suffix(".whole")
    digest = hashlib.sha256()
    try:
        with whole.open("xb") as out:
            for sha256 in parts:
                path = opened.objects.local(sha256)
                if path is None:
                    path = folder / "part"
                    opened.objects.fetch(sha256, path)
                _copy(path, out, digest)
            for offset in offsets:
                opened.objects.fetch_part(upload_id, offset, folder / "part")
                _copy(folder / "part", out, digest)
            out.flush()
            os.fsync(out.fileno())
    except BaseException:
        whole.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Received(whole, digest.hexdigest(), row.bytes, filename=row.filename)


def _all_offsets(opened: Context, row: Any) -> range:
    missing = transfers.missing(row, opened.objects.parts(row.id))
    if missing:
        raise OffsetMismatch(f"{len(missing)} parts have not arrived, the first at byte {missing[0][0]}; ask for their URLs and send them", missing[0][0])
    return range(0, row.bytes, row.part_bytes)


def _copy(path: Path, out: Any, digest: Any) -> None:
    with path.open("rb") as source:
        while piece := source.read(CHUNK):
            digest.update(piece)
            out.write(piece)

"""Downloads: ETag, Range, If-Range, conditional requests, digests, HEAD."""

from __future__ import annotations

import base64
import re
from email.utils import formatdate
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from service.problems import Problem
from store.objects import Objects

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def blob(request: Request, objects: Objects, *, sha256: str, size: int, filename: str, media_type: str, created_at: float) -> Response:
    """Answer with an object's bytes, or the part of them the request asks for.

    Raises `Problem` (`range_not_satisfiable`).
    """
    etag = f'"sha256:{sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:",
        "Last-Modified": formatdate(created_at, usegmt=True),
        "Cache-Control": "private, immutable, max-age=31536000",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    start, end, status = 0, size, 200
    wanted = request.headers.get("range")
    if wanted is not None and request.headers.get("if-range", etag) in (etag, headers["Last-Modified"]):
        part = _part(wanted, size)
        if part is not None:
            start, end = part
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    return StreamingResponse(objects.stream(sha256, start, end), status, headers, media_type)


def _part(wanted: str, size: int) -> tuple[int, int] | None:
    """Return the [start, end) a Range header asks for; None for forms that may be ignored (several ranges, other units)."""
    match = RANGE.fullmatch(wanted.strip())
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    start, end = (max(size - int(last), 0), size) if not first else (int(first), min(int(last) + 1, size) if last else size)
    if first and last and int(last) < int(first):
        return None
    if start >= size or end <= start:
        raise Problem("range_not_satisfiable", f"The file has {size} bytes.", headers={"Content-Range": f"bytes */{size}"})
    return start, end

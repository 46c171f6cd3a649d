"""Every error the API can answer with, as one table (RFC 9457); docs, OpenAPI and handlers follow from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from store.errors import OffsetMismatch, StoreError

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Kind:
    """One entry of the catalogue."""

    status: int
    title: str
    retryable: bool = False


CATALOGUE = {
    "malformed_body": Kind(400, "The body cannot be read"),
    "unauthenticated": Kind(401, "A valid API key is needed"),
    "key_expired": Kind(401, "The API key has expired"),
    "insufficient_scope": Kind(403, "The API key may not do this"),
    "quota_exceeded": Kind(403, "A limit of this tenant has been reached"),
    "not_found": Kind(404, "There is no such thing"),
    "report_not_ready": Kind(404, "The job has no report yet"),
    "method_not_allowed": Kind(405, "The resource does not support this method"),
    "not_acceptable": Kind(406, "The resource has no such representation"),
    "not_terminal": Kind(409, "The job is still under way"),
    "in_use": Kind(409, "Something still needs it"),
    "offset_mismatch": Kind(409, "The upload goes on elsewhere"),
    "upload_mode": Kind(409, "The upload's parts go another way"),
    "not_ready": Kind(409, "The upload cannot be used"),
    "too_large": Kind(413, "The body is too large"),
    "unsupported_media_type": Kind(415, "The body has an unsupported media type"),
    "range_not_satisfiable": Kind(416, "The range lies outside the file"),
    "invalid_parameters": Kind(422, "Parameters are missing or out of range"),
    "idempotency_key_reused": Kind(422, "The Idempotency-Key was used for another request"),
    "digest_mismatch": Kind(422, "The bytes do not have the announced digest"),
    "unsafe_file": Kind(422, "The file was refused because it is not safe to read"),
    "unsupported_format": Kind(422, "The file has a format that is not taken"),
    "damaged_file": Kind(422, "The file is incomplete or altered"),
    "weights_not_finite": Kind(422, "The weights hold NaN or infinity"),
    "architecture_unknown": Kind(422, "The architecture is not in the catalogue"),
    "architecture_mismatch": Kind(422, "The tensors contradict the architecture"),
    "dataset_invalid": Kind(422, "The data set cannot be used"),
    "internal": Kind(500, "Something went wrong here"),
    "store_unavailable": Kind(503, "The database or object store does not answer", retryable=True),
    "storage_full": Kind(507, "There is no space left"),
}


class Problem(Exception):
    """An error answer.

    Args:
        code: a key of `CATALOGUE`.
        detail: what was wrong and what to do about it.
        errors: per field: `{pointer, code, detail}`.
    """

    def __init__(self, code: str, detail: str, *, errors: list[dict[str, str]] | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.errors = errors or []
        self.headers = headers or {}


def response(request: Request, problem: Problem) -> JSONResponse:
    """Return the problem as application/problem+json."""
    kind = CATALOGUE[problem.code]
    body: dict[str, Any] = {
        "type": f"https://unpoison.readthedocs.io/problems/{problem.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": problem.detail,
        "instance": request.url.path,
        "code": problem.code,
        "request_id": getattr(request.state, "request_id", ""),
        "retryable": kind.retryable,
        "errors": problem.errors,
    }
    headers = dict(problem.headers)
    if kind.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if kind.status == 503:
        headers["Retry-After"] = "5"
    headers["Cache-Control"] = "no-store"
    return JSONResponse(body, kind.status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of the application with a problem."""

    async def problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        return response(request, error)

    async def store(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StoreError)
        headers = {"Upload-Offset": str(error.offset)} if isinstance(error, OffsetMismatch) else None
        return response(request, Problem(error.code if error.code in CATALOGUE else "internal", error.detail, headers=headers))

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response(request, _from_validation(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        codes = {404: "not_found", 405: "method_not_allowed", 400: "malformed_body", 413: "too_large", 415: "unsupported_media_type"}
        code = codes.get(error.status_code, "internal")
        headers = dict(error.headers or {})
        if error.status_code == 405:
            # Starlette names the methods of the first route of this path only.
            headers["Allow"] = ", ".join(_methods(request)) or headers.get("Allow", "")
        return response(request, Problem(code, str(error.detail), headers=headers))

    async def anything(request: Request, error: Exception) -> JSONResponse:
        return response(request, Problem("internal", "The error was logged under this request's id; please report it."))

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(StoreError, store)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, anything)


def _methods(request: Request) -> list[str]:
    """Return the methods that the document lists for the request's path."""
    found: set[str] = set()
    for template, methods in request.app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template)), request.url.path):
            found |= {method.upper() for method in methods}
    return sorted(found)


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI `responses` for these codes, and those that any route can answer."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in ("unauthenticated", "insufficient_scope", "invalid_parameters", "store_unavailable", *codes):
        kind = CATALOGUE[code]
        entry = found.setdefault(kind.status, {"description": kind.title, "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}})
        if kind.title not in entry["description"]:
            entry["description"] += f"; {kind.title.lower()}"
    return found


def _from_validation(error: RequestValidationError) -> Problem:
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        return Problem("malformed_body", f"The body is not JSON: {found[0].get('ctx', {}).get('error', found[0]['msg'])}")
    errors = []
    for item in found:
        place, *path = item["loc"]
        # pydantic names the branch of the `method` union it took; that is no part of the body.
        steps = [str(part) for index, part in enumerate(path) if not (index and path[index - 1] in ("defense", "attack") and len(path) > index + 1)]
        pointer = "/" + "/".join(steps) if place == "body" else f"{place}:{'/'.join(steps)}"
        errors.append({"pointer": pointer, "code": str(item["type"]), "detail": str(jsonable_encoder(item["msg"]))})
    listing = "; ".join(f"{item['pointer']}: {item['detail']}" for item in errors[:3])
    return Problem("invalid_parameters", listing, errors=errors)

"""`/v1/jobs` and `/v1/artifacts`: create, follow, cancel, retry, delete, download."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy.orm import Session

from core import architectures, catalog, poisoning
from core.errors import BadRecipe, EngineError
from core.poisoning import AttackParams
from service import blobs, schemas
from service.api.uploads import DOWNLOAD
from service.context import Caller, Context, Opened, Reading, Writing
from service.lists import After, Limit, Order, linked
from service.problems import CATALOGUE, Problem, documented
from store import idempotency, jobs, library, queue, quotas, states
from store.tables import Artifact, Dataset, Job, Model

router = APIRouter(tags=["jobs"])
STREAM_SECONDS = 600.0
POLL_SECONDS = 0.5
PING_SECONDS = 15.0
IdempotencyKey = Annotated[
    str | None, Header(max_length=255, min_length=1, pattern=r"^[\x21-\x7e]+$", description="Makes a repeated request harmless for 24 hours.")
]
Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "crashed", "cancelled"]


@router.post(
    "/v1/jobs", status_code=202, response_model=schemas.Job, operation_id="create_job", summary="Run a defense",
    responses={**documented("malformed_body", "quota_exceeded", "not_found", "not_ready", "idempotency_key_reused"), 200: {"model": schemas.Plan, "description": "With `validate_only`: what would be done."}},
)  # fmt: skip
def create(
    body: schemas.NewJob,
    opened: Opened,
    caller: Writing,
    validate_only: Annotated[bool, Query(description="Check everything and run nothing.")] = False,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue a job; the answer comes at once, the job goes on without it."""
    method = catalog.defenses()[body.defense.method]
    request = body.model_dump(mode="json")
    with opened.database.read() as session:
        _check(session, caller, body, method)
    if validate_only:
        return JSONResponse({"object": "plan", "method": method.name, "kind": method.kind.value, "request": request})

    def act(session: Session) -> dict[str, Any]:
        _check(session, caller, body, method)
        quotas.check_job(session, opened.settings, caller.tenant)
        row = jobs.create(
            session, tenant=caller.tenant, kind=method.kind.value, method=method.name, model_id=body.model_id, dataset_id=body.dataset_id,
            test_dataset_id=body.evaluation.dataset_id if body.evaluation else None, triggered_dataset_id=_triggered_id(body),
            suspect_dataset_id=body.suspect_dataset_id,
            request=request, seed=body.seed, max_seconds=body.max_seconds or opened.settings.max_job_seconds, labels=body.metadata,
        )  # fmt: skip
        return schemas.Job.of(row).model_dump(mode="json")

    return _accepted(opened, caller, "POST /v1/jobs", idempotency_key, request, act)


@router.get("/v1/jobs", response_model=schemas.Page[schemas.Job], responses=documented("not_found"), operation_id="list_jobs", summary="List jobs")
def listing(
    request: Request,
    response: Response,
    opened: Opened,
    caller: Reading,
    limit: Limit = 20,
    after: After = None,
    order: Order = "desc",
    status: Annotated[Status | None, Query()] = None,
    method: Annotated[schemas.NoNul | None, Query()] = None,
    model_id: Annotated[schemas.Identifier | None, Query()] = None,
) -> Any:
    """List jobs by time of creation."""
    wanted = ((Job.status, status), (Job.method, method), (Job.model_id, model_id))
    where = [column == value for column, value in wanted if value is not None]
    with opened.database.read() as session:
        rows, cursor = library.page(session, Job, caller.tenant, limit=limit, after=after, where=where, newest_first=order == "desc")
    return linked(request, response, [schemas.Job.of(row) for row in rows], cursor)


@router.get(
    "/v1/jobs/{job_id}", response_model=schemas.Job, operation_id="get_job", summary="Get a job",
    responses={**documented("not_found"), 304: {"description": "Unchanged since the version in `If-None-Match`."}},
)  # fmt: skip
async def get(
    job_id: str,
    request: Request,
    opened: Opened,
    caller: Reading,
    wait: Annotated[float, Query(ge=0, le=60, description="Wait up to this many seconds for a change.")] = 0,
) -> Response:
    """Return the job; with `If-None-Match` and `wait`, as soon as it changes."""
    known = request.headers.get("if-none-match", "").strip().removeprefix("W/")
    until = time.monotonic() + wait
    while True:
        row = await opened.database.ask(lambda: _get(opened, caller, job_id))
        etag = f'"{row.last_seq}"'
        headers = {"ETag": etag, "Cache-Control": "no-store"}
        if etag != known and (known or not wait or row.status in states.TERMINAL):
            return Response(schemas.Job.of(row).model_dump_json(), media_type="application/json", headers=headers)
        if time.monotonic() >= until or (etag == known and row.status in states.TERMINAL):
            if etag == known:
                return Response(status_code=304, headers=headers)
            return Response(schemas.Job.of(row).model_dump_json(), media_type="application/json", headers=headers)
        # Without a version to compare with, the first answer is what a change is measured from.
        known = known or etag
        await asyncio.sleep(min(POLL_SECONDS, max(until - time.monotonic(), 0)))


@router.post("/v1/jobs/{job_id}/cancel", response_model=schemas.Job, operation_id="cancel_job", summary="Cancel a job",
    responses={**documented("not_found"), 202: {"model": schemas.Job, "description": "The job is being stopped."}})  # fmt: skip
def cancel(job_id: str, response: Response, opened: Opened, caller: Writing) -> Any:
    """Stop a job; one that has ended is returned as it is."""
    with opened.database.write() as session:
        row = jobs.request_cancel(session, job_id, caller.tenant)
    response.status_code = 202 if row.status == states.CANCELLING else 200
    return schemas.Job.of(row)


@router.post(
    "/v1/jobs/{job_id}/retry", status_code=202, response_model=schemas.Job, operation_id="retry_job", summary="Run a job again",
    responses=documented("quota_exceeded", "not_found", "not_terminal", "not_ready", "idempotency_key_reused"),
)  # fmt: skip
def retry(job_id: str, opened: Opened, caller: Writing, idempotency_key: IdempotencyKey = None) -> Response:
    """Queue a new job with the same request and seed."""

    def act(session: Session) -> dict[str, Any]:
        old = jobs.get(session, job_id, caller.tenant)
        if old.status in states.TERMINAL:
            quotas.check_job(session, opened.settings, caller.tenant)
            _check_inputs(session, caller, old.model_id, (old.dataset_id, old.test_dataset_id, old.triggered_dataset_id, old.suspect_dataset_id))
        return schemas.Job.of(jobs.retry(session, job_id, caller.tenant)).model_dump(mode="json")

    return _accepted(opened, caller, f"POST /v1/jobs/{job_id}/retry", idempotency_key, {}, act)


@router.delete("/v1/jobs/{job_id}", status_code=204, operation_id="delete_job", summary="Delete a job", responses=documented("not_found", "not_terminal"))
def delete(job_id: str, opened: Opened, caller: Writing) -> None:
    """Delete a job that has ended, with its artifacts; a model it made stays."""
    with opened.database.write() as session:
        jobs.delete(session, job_id, caller.tenant)


@router.get(
    "/v1/jobs/{job_id}/events",
    response_model=schemas.Page[schemas.Event],
    operation_id="list_events",
    summary="List a job's events",
    responses=documented("not_found"),
)
def events(
    job_id: str,
    response: Response,
    opened: Opened,
    caller: Reading,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="The last `seq` seen.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    type: Annotated[schemas.NoNul | None, Query()] = None,  # noqa: A002 - the name in the API
) -> Any:
    """Return what happened, in order."""
    with opened.database.read() as session:
        jobs.get(session, job_id, caller.tenant)
        rows = jobs.events(session, job_id, after=after, limit=limit + 1, kind=type)
    more = len(rows) > limit
    response.headers["Cache-Control"] = "no-store"
    data = [schemas.Event.of(row) for row in rows[:limit]]
    return {"object": "list", "data": data, "has_more": more, "next_cursor": str(data[-1].seq) if more else None}


@router.get(
    "/v1/jobs/{job_id}/events/stream", operation_id="stream_events", summary="Follow a job's events (SSE)", response_class=StreamingResponse,
    responses={
        **documented("not_found"),
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "The job has ended and every event was sent."},
    },
)  # fmt: skip
def stream(
    job_id: str,
    opened: Opened,
    caller: Reading,
    last_event_id: Annotated[str | None, Header(description="Resume after this `seq`.")] = None,
    after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
) -> Response:
    """Send events as they happen; the last one is the terminal state, then the stream closes."""
    start = int(last_event_id) if last_event_id and last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 10 else after
    row = _get(opened, caller, job_id)
    if row.status in states.TERMINAL and start >= row.last_seq:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_tail(opened, job_id, start), media_type="text/event-stream", headers=headers)


async def _tail(opened: Context, job_id: str, seen: int) -> AsyncIterator[str]:
    """Yield server-sent events: a tail of the table, so that any process can serve it and nothing is missed."""
    yield "retry: 2000\n\n"
    started = spoke = time.monotonic()
    while time.monotonic() - started < STREAM_SECONDS:
        rows = await asyncio.to_thread(_events_after, opened, job_id, seen)
        for row in rows:
            seen = row.seq
            body = schemas.Event.of(row).model_dump_json()
            yield f"id: {row.seq}\nevent: {row.type}\ndata: {body}\n\n"
            if row.type == "state" and row.data.get("status") in states.TERMINAL:
                return
        if rows:
            spoke = time.monotonic()
            continue
        if time.monotonic() - spoke > PING_SECONDS:
            spoke = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SECONDS)


@router.get(
    "/v1/jobs/{job_id}/artifacts",
    response_model=schemas.Page[schemas.Artifact],
    operation_id="list_artifacts",
    summary="List a job's files",
    responses=documented("not_found"),
)
def artifacts(job_id: str, response: Response, opened: Opened, caller: Reading) -> Any:
    """Return what the job gave back; all of it, there are few."""
    with opened.database.read() as session:
        jobs.get(session, job_id, caller.tenant)
        rows = jobs.artifacts(session, job_id)
    response.headers["Cache-Control"] = "no-store"
    return {"object": "list", "data": [schemas.Artifact.of(row) for row in rows], "has_more": False, "next_cursor": None}


@router.get(
    "/v1/jobs/{job_id}/report", operation_id="get_report", summary="Get a job's report", response_model=dict[str, Any],
    responses={**documented("not_found", "report_not_ready", "not_acceptable", "range_not_satisfiable"), 206: DOWNLOAD[206], 304: DOWNLOAD[304]},  # type: ignore[dict-item]
)  # fmt: skip
def report(job_id: str, request: Request, opened: Opened, caller: Reading) -> Response:
    """Return the evidence: what was measured before and after, what was found, what was done."""
    accepted = [entry.split(";")[0].strip() for entry in request.headers.get("accept", "*/*").split(",")]
    if not {"*/*", "application/*", "application/json", ""} & set(accepted):
        raise Problem("not_acceptable", "The report is application/json.")
    with opened.database.read() as session:
        row = jobs.get(session, job_id, caller.tenant)
        found = next((item for item in jobs.artifacts(session, job_id) if item.kind == "report_json"), None)
    if found is None:
        raise Problem("report_not_ready", f"Job {job_id} is {row.status}; the report comes with success.")
    answer = _download(request, opened, found)
    answer.headers["Vary"] = "Accept"
    return answer


@router.get(
    "/v1/artifacts/{artifact_id}",
    response_model=schemas.Artifact,
    operation_id="get_artifact",
    summary="Get an artifact",
    responses=documented("not_found"),
    tags=["artifacts"],
)
def artifact(artifact_id: str, response: Response, opened: Opened, caller: Reading) -> Any:
    """Describe one file."""
    with opened.database.read() as session:
        row = jobs.artifact(session, artifact_id, caller.tenant)
    response.headers["Cache-Control"] = "no-store"
    return schemas.Artifact.of(row)


@router.head(
    "/v1/artifacts/{artifact_id}/content",
    operation_id="head_artifact",
    summary="Ask about an artifact's file",
    tags=["artifacts"],
    responses=documented("not_found", "range_not_satisfiable"),
)
@router.get(
    "/v1/artifacts/{artifact_id}/content", response_class=Response, operation_id="download_artifact", summary="Download an artifact", tags=["artifacts"],
    responses={**documented("not_found", "range_not_satisfiable"), **DOWNLOAD},  # type: ignore[dict-item]
)  # fmt: skip
def artifact_content(artifact_id: str, request: Request, opened: Opened, caller: Reading) -> Response:
    """Return a file's bytes."""
    with opened.database.read() as session:
        row = jobs.artifact(session, artifact_id, caller.tenant)
    return _download(request, opened, row)


def _download(request: Request, opened: Context, row: Artifact) -> Response:
    return blobs.blob(request, opened.objects, sha256=row.sha256, size=row.bytes, filename=row.filename, media_type=row.media_type, created_at=row.created_at)


def _accepted(opened: Context, caller: Caller, route: str, key: str | None, request: Any, act: Any) -> Response:
    answer, replayed = idempotency.once(opened.database, key_id=caller.key_id, route=route, value=key, request=request, act=act)
    if not replayed and queue.announce(opened.celery, answer["id"]):
        with opened.database.write() as session:
            jobs.announced(session, [answer["id"]])
    headers = {"Location": f"/v1/jobs/{answer['id']}", "Cache-Control": "no-store"}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return Response(json.dumps(answer), 202, headers, "application/json")


def _check(session: Session, caller: Caller, body: schemas.NewJob, method: catalog.Method) -> None:
    """Refuse a job that cannot succeed before anything is queued.

    Raises `Problem`, `NotFound`, `NotReady`.
    """
    test_id = body.evaluation.dataset_id if body.evaluation else None
    wanted = (body.dataset_id, test_id, _triggered_id(body), body.suspect_dataset_id)
    model, (clean, test, triggered, suspect) = _check_inputs(session, caller, body.model_id, wanted)
    needed = catalog.needs(method, body.defense)
    for need, given, what in (
        (catalog.Need.MODEL, model, "a suspect model. Give it as model_id."),
        (catalog.Need.SUSPECT_DATASET, suspect, "a training set to judge. Give it as suspect_dataset_id."),
        (catalog.Need.CLEAN_IMAGES, clean, "clean images. Give their data set as dataset_id."),
        (catalog.Need.TEST_SET, test, "a labelled test set. Give it as evaluation.dataset_id."),
    ):
        if given is None and need in needed:
            raise Problem("invalid_parameters", f"{method.title} needs {what}")
    if suspect is not None and catalog.Need.SUSPECT_DATASET not in method.needs:
        raise Problem("invalid_parameters", f"{method.title} works on a model. Leave suspect_dataset_id out, or choose a method that cleanses or trains.")
    if model is not None and method.kind is catalog.Kind.TRAIN:
        raise Problem("invalid_parameters", f"{method.title} trains a model of its own. Leave model_id out.")
    judged = (model if model is not None else suspect).description or {}  # type: ignore[union-attr]
    classes = judged["classes"] if model is not None else len(judged["per_class"])
    if judged.get("embedding"):
        if not method.encoders:
            raise Problem("architecture_mismatch", f"{judged['architecture']} is an encoder without classes; {method.name} works on classifiers. Use cbd.")
        # An encoder has no classes of its own: the images' are what it is measured with.
        classes = max([len((data.description or {})["per_class"]) for data in (clean, test, triggered, suspect) if data is not None], default=0)
    if suspect is not None:
        _check_suspect(suspect, body.defense)
    targets = {"/defense/target": getattr(body.defense, "target", None)}
    if body.evaluation and body.evaluation.triggered:
        if body.evaluation.attack:
            raise Problem("invalid_parameters", "Both an attack and triggered images were given. Give one of them.")
        targets["/evaluation/triggered/target"] = body.evaluation.triggered.target
    if body.evaluation and body.evaluation.attack and body.evaluation.attack.labels != "all_to_all":
        targets["/evaluation/attack/target"] = body.evaluation.attack.target
    for pointer, target in targets.items():
        if target is not None and target >= classes:
            detail = f"{target} is not one of the {classes} classes, which count from 0"
            raise Problem("invalid_parameters", detail, errors=[{"pointer": pointer, "code": "less_than", "detail": detail}])
    whose = "the model" if model is not None else "the training set"
    for role, data in (("clean", clean), ("test", test), ("triggered", triggered), ("suspect", suspect)):
        described = (data.description or {}) if data else {}
        found = len(described.get("per_class", ()))
        if data is None:
            continue
        if described["labelled"] and (found > classes or (described["class_names"] and found != classes)):
            raise Problem("dataset_invalid", f"The {role} data set {data.id} has {found} classes, {whose} {classes}. Upload images of exactly those classes.")
        if described["channels"] != judged["channels"]:
            raise Problem("dataset_invalid", f"The {role} data set has {described['channels']} channels, {whose} {judged['channels']}.")
        if role != "clean" and not described["labelled"]:
            raise Problem("dataset_invalid", f"The {role} images have no labels. Upload them as a folder a class, or with a `labels` array.")
    _check_apart(suspect, clean, test, triggered)
    _check_names([data for data in (suspect, clean, test, triggered) if data is not None])
    if body.evaluation and body.evaluation.attack and test is not None:
        _check_attack(body.evaluation.attack, test, classes)
    if clean is not None and catalog.Need.CLEAN_LABELS in needed and not (clean.description or {})["labelled"]:
        raise Problem("dataset_invalid", f"{method.title} needs labelled clean images, data set {clean.id} has no labels.")
    candidates = judged.get("candidates", ())
    if model is not None and body.architecture is not None and body.architecture not in candidates:
        raise Problem("architecture_mismatch", f"The checkpoint is {' or '.join(candidates)}, not {body.architecture}.")


def _check_apart(suspect: Dataset | None, clean: Dataset | None, test: Dataset | None, triggered: Dataset | None) -> None:
    """Refuse to compare a training set with itself: whatever it holds would look usual."""
    for role, data in (("clean", clean), ("test", test), ("triggered", triggered)):
        if suspect is not None and data is not None and data.sha256 == suspect.sha256:
            detail = f"The {role} images are the very file that is not trusted. Give images from a source that you trust, or a method that needs none."
            raise Problem("invalid_parameters", detail)


def _check_names(given: list[Dataset]) -> None:
    """Refuse data sets whose classes do not have the same names in the same order: labels are compared by their numbers."""
    described = [(data.id, data.description or {}) for data in given]
    named = [(dataset_id, found["class_names"]) for dataset_id, found in described if found["labelled"] and found["class_names"]]
    for dataset_id, names in named[1:]:
        first_id, wanted = named[0]
        for label, (one, other) in enumerate(zip(wanted, names, strict=True)):
            if one != other:
                detail = (
                    f"Class {label} is '{one}' in data set {first_id} and '{other}' in {dataset_id}. Give the classes the same names and order: folders "
                    "count alphabetically, or as a classes.txt lists them."
                )
                raise Problem("dataset_invalid", detail)


def _check_suspect(suspect: Dataset, defense: Any) -> None:
    """Refuse a training set that no cleanser could judge, and an architecture that does not exist."""
    described = suspect.description or {}
    if not described["labelled"]:
        raise Problem("dataset_invalid", f"The training set {suspect.id} has no labels. Upload it as a folder a class, or with a table of labels.")
    try:
        catalog.check_classes(described["per_class"], described["class_names"])
        for name in (getattr(part, "architecture", None) for part in (defense, getattr(defense, "split", None))):
            if name is not None:
                architectures.named(name, classes=len(described["per_class"]), channels=described["channels"])
    except EngineError as error:
        code = error.code if error.code in CATALOGUE else "dataset_invalid"
        raise Problem(code, f"{error.message}. {error.advice}") from error


def _check_attack(attack: AttackParams, test: Dataset, classes: int) -> None:
    """Refuse an attack that these images cannot carry, or that cannot be declared, before anything is made."""
    described = test.description or {}
    try:
        poisoning.declared(attack, (described["channels"], described["height"], described["width"]), classes)
    except BadRecipe as error:
        detail = f"{error.message}. {error.advice}"
        raise Problem("invalid_parameters", detail, errors=[{"pointer": "/evaluation/attack", "code": error.code, "detail": detail}]) from error


def _triggered_id(body: schemas.NewJob) -> str | None:
    return body.evaluation.triggered.dataset_id if body.evaluation and body.evaluation.triggered else None


def _check_inputs(session: Session, caller: Caller, model_id: str | None, dataset_ids: tuple[str | None, ...]) -> tuple[Model | None, list[Dataset | None]]:
    model = library.ready(session, Model, model_id, caller.tenant) if model_id else None
    return model, [library.ready(session, Dataset, one, caller.tenant) if one else None for one in dataset_ids]


def _get(opened: Context, caller: Caller, job_id: str) -> Job:
    with opened.database.read() as session:
        return jobs.get(session, job_id, caller.tenant)


def _events_after(opened: Context, job_id: str, seen: int) -> list[Any]:
    with opened.database.read() as session:
        return jobs.events(session, job_id, after=seen, limit=500)

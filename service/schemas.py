"""What goes in and comes out, as JSON; unknown request fields are errors."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field, PlainSerializer, StringConstraints

from core import catalog
from core.job import PreprocessingSpec
from service.problems import CATALOGUE
from store import tables


def _rfc3339(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[float, PlainSerializer(_rfc3339, return_type=str), Field(json_schema_extra={"type": "string", "format": "date-time"})]
OptionalTime = Annotated[float | None, PlainSerializer(_rfc3339, return_type=str | None)]
NoNul = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=200)]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", min_length=1, max_length=200)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]+$", min_length=1, max_length=64)], NoNul],
    Field(max_length=16, json_schema_extra={"additionalProperties": False}),
]
Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,5}_[0-9a-z]{26}$")]


RESIZE = "Make every picture of a data set a square of this many pixels: the shorter side is scaled to it, the middle is kept."
Resize = Annotated[int | None, Query(ge=8, le=1024, description=RESIZE)]


class Incoming(catalog.Strict):
    """Base of request bodies."""


class FieldError(BaseModel):
    """What is wrong with one field."""

    pointer: str
    code: str
    detail: str


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: Literal[tuple(CATALOGUE)]  # type: ignore[valid-type]
    request_id: str
    retryable: bool
    errors: list[FieldError]


class Refusal(BaseModel):
    """Why a file was refused."""

    code: str
    message: str
    advice: str


class Upload(BaseModel):
    """What models and datasets have in common."""

    id: str
    name: str
    filename: str
    status: Literal["received", "ready", "rejected"]
    bytes: int
    sha256: str
    description: dict[str, Any] | None = Field(description="What the file turned out to be.")
    refusal: Refusal | None
    metadata: dict[str, str]
    created_at: Time


class Model(Upload):
    """A suspect or purified model."""

    object: Literal["model"] = "model"
    origin_job_id: str | None

    @classmethod
    def of(cls, row: tables.Model) -> Model:
        """Return the JSON form of a row."""
        return cls(**_upload(row), origin_job_id=row.origin_job_id)


class Dataset(Upload):
    """A set of images."""

    object: Literal["dataset"] = "dataset"
    origin_job_id: str | None
    resize: int | None

    @classmethod
    def of(cls, row: tables.Dataset) -> Dataset:
        """Return the JSON form of a row."""
        return cls(**_upload(row), origin_job_id=row.origin_job_id, resize=row.resize)


def _upload(row: tables.Model | tables.Dataset) -> dict[str, Any]:
    return {
        "id": row.id, "name": row.name, "filename": row.filename, "status": row.status, "bytes": row.bytes, "sha256": row.sha256,
        "description": row.description, "refusal": row.refusal, "metadata": row.labels, "created_at": row.created_at,
    }  # fmt: skip


class Preview(BaseModel):
    """What an upload would be; nothing was stored."""

    object: Literal["preview"] = "preview"
    filename: str
    bytes: int
    sha256: str
    description: dict[str, Any]


class Deed(BaseModel):
    """An entry of the audit log."""

    id: str
    object: Literal["deed"] = "deed"
    action: str = Field(description="The operation, as this document names it.")
    subject: str = Field(description="The id it was about; empty when there is none.")
    key_id: str
    status: int = Field(description="Of the answer; 0 when the connection broke before there was one.")
    request_id: str
    address: str
    created_at: Time

    @classmethod
    def of(cls, row: tables.Deed) -> Deed:
        """Return the JSON form of a row."""
        return cls(
            id=row.id, action=row.action, subject=row.subject, key_id=row.key_id, status=row.status, request_id=row.request_id, address=row.address,
            created_at=row.created_at,
        )  # fmt: skip


class NewTransfer(Incoming):
    """A file that will arrive in parts."""

    kind: Literal["model", "dataset"]
    bytes: int = Field(ge=1, le=2**53 - 1, description="How large the whole file is.")
    filename: NoNul = ""
    name: NoNul = ""
    mode: Literal["proxy", "direct"] = Field(
        default="proxy", description="`direct` asks for presigned URLs of the object store; the answer says `proxy` where the service gives none."
    )


class Completion(Incoming):
    """What the parts must add up to."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = Field(description="Of the whole file, in hex.")
    resize: int | None = Field(default=None, ge=8, le=1024, description=RESIZE)


class Transfer(BaseModel):
    """A file that arrives in parts."""

    id: str
    object: Literal["upload"] = "upload"
    kind: Literal["model", "dataset"]
    filename: str
    bytes: int
    offset: int = Field(description="How many bytes have arrived; through the API: where the next part begins.")
    mode: Literal["proxy", "direct"] = Field(description="`proxy`: PATCH the parts here; `direct`: PUT them to the URLs of `…/urls`.")
    part_bytes: int | None = Field(description="The size of every part but the last, when they go straight to the object store.")
    result_id: str | None = Field(description="The model or dataset it became.")
    created_at: Time
    expires_at: Time

    @classmethod
    def of(cls, row: tables.Transfer, arrived: int) -> Transfer:
        """Return the JSON form of a row."""
        return cls(
            id=row.id, kind=row.kind, filename=row.filename, bytes=row.bytes, offset=arrived, mode="direct" if row.part_bytes else "proxy",
            part_bytes=row.part_bytes, result_id=row.result_id, created_at=row.created_at, expires_at=row.expires_at,
        )  # fmt: skip


class PartUrl(BaseModel):
    """Where one part of a file goes, by PUT and without an API key."""

    offset: int
    bytes: int
    url: str


class PartUrls(BaseModel):
    """The first parts that are missing; none when all have arrived."""

    object: Literal["part_urls"] = "part_urls"
    data: list[PartUrl]
    missing: int = Field(description="How many parts are missing, these included.")
    expires_at: Time = Field(description="When the URLs stop working; ask again then.")


class Method(BaseModel):
    """A defense or an attack of the catalogue."""

    object: Literal["method"] = "method"
    name: str
    kind: Literal["inspect", "purify", "cleanse", "train", "evaluate", "attack"]
    title: str
    summary: str
    paper: str
    caution: str = Field(description="What the method was measured to cost or to leave; empty where nothing stands out.")
    needs: list[str]
    params_schema: dict[str, Any]
    defaults: dict[str, Any]


class Proposal(BaseModel):
    """A job worth trying."""

    object: Literal["proposal"] = "proposal"
    kind: Literal["inspect", "purify", "cleanse", "train"]
    defense: dict[str, Any] = Field(description="What to send as `defense`.")
    needs: list[str]
    why: str


class Triggered(Incoming):
    """Images that already carry the trigger."""

    dataset_id: Identifier = Field(description="The images, labelled with their true classes.")
    target: int | None = Field(default=None, ge=0, le=100_000, description="The class they are sent to; left out: all-to-all, class y to y + 1.")


class Evaluation(Incoming):
    """What to measure with, before and after. The attack or the triggered images, not both: then ASR is measured."""

    dataset_id: Identifier = Field(description="A labelled clean test set.")
    attack: catalog.union(catalog.attacks()) | None = Field(default=None, description="The attack, if it is known and need not be trained.")  # type: ignore[valid-type]
    triggered: Triggered | None = None


class NewJob(Incoming):
    """A job to run."""

    model_id: Identifier | None = Field(default=None, description="The suspect model; methods that cleanse or train need none.")
    dataset_id: Identifier | None = Field(default=None, description="The clean images, if the method needs any.")
    suspect_dataset_id: Identifier | None = Field(default=None, description="The untrusted training set, for methods that cleanse it or train on it.")
    defense: catalog.union(catalog.defenses())  # type: ignore[valid-type]
    evaluation: Evaluation | None = None
    architecture: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.\-]+$", max_length=64)] | None = Field(
        default=None, description="Only needed when several fit."
    )
    preprocessing: PreprocessingSpec | None = Field(default=None, description="Found out from BatchNorm statistics when left out.")
    seed: int = Field(default=0, ge=0, le=2**53 - 1)
    max_seconds: float | None = Field(default=None, gt=0, le=30 * 86_400, description="The job fails with `timeout` after this long.")
    metadata: Metadata = Field(default_factory=dict)


class Progress(BaseModel):
    """How far a job is."""

    phase: str
    step: int
    total: int
    fraction: float
    metrics: dict[str, float] = Field(description="The newest BA and ASR measured while the job runs.")


class Urls(BaseModel):
    """Where a job's parts are."""

    self: str
    events: str
    stream: str
    cancel: str
    artifacts: str
    report: str


class JobError(BaseModel):
    """Why a job did not succeed."""

    code: str
    detail: str
    advice: str
    phase: str | None
    retryable: bool


class Job(BaseModel):
    """A job and what came of it."""

    id: str
    object: Literal["job"] = "job"
    status: Literal["queued", "running", "cancelling", "succeeded", "failed", "crashed", "cancelled"]
    kind: str
    method: str
    phase: str | None
    progress: Progress | None
    model_id: str | None
    dataset_id: str | None
    suspect_dataset_id: str | None
    defense: dict[str, Any]
    evaluation: dict[str, Any] | None
    seed: int
    max_seconds: float
    attempt: int
    version: int = Field(description="Grows with every change; the number of the newest event.")
    results: dict[str, Any] | None
    error: JobError | None
    cleaned_model_id: str | None
    cleansed_dataset_id: str | None
    retry_of: str | None
    metadata: dict[str, str]
    created_at: Time
    queued_at: Time
    started_at: OptionalTime
    finished_at: OptionalTime
    cancel_requested_at: OptionalTime
    urls: Urls

    @classmethod
    def of(cls, row: tables.Job) -> Job:
        """Return the JSON form of a row."""
        base = f"/v1/jobs/{row.id}"
        return cls(
            id=row.id, status=row.status, kind=row.kind, method=row.method, phase=row.phase, progress=row.progress,
            model_id=row.model_id, dataset_id=row.dataset_id, suspect_dataset_id=row.suspect_dataset_id, defense=row.request["defense"], evaluation=row.request["evaluation"],
            seed=row.seed, max_seconds=row.max_seconds, attempt=row.attempt, version=row.last_seq, results=row.results,
            error=row.error, cleaned_model_id=row.cleaned_model_id, cleansed_dataset_id=row.cleansed_dataset_id, retry_of=row.retry_of, metadata=row.labels,
            created_at=row.created_at, queued_at=row.queued_at, started_at=row.started_at, finished_at=row.finished_at,
            cancel_requested_at=row.cancel_requested_at,
            urls=Urls(
                self=base, events=f"{base}/events", stream=f"{base}/events/stream", cancel=f"{base}/cancel",
                artifacts=f"{base}/artifacts", report=f"{base}/report",
            ),
        )  # fmt: skip


class Plan(BaseModel):
    """What a job would do: the request with every default filled in."""

    object: Literal["plan"] = "plan"
    method: str
    kind: str
    request: dict[str, Any]


class Event(BaseModel):
    """Something that happened in a job."""

    id: str
    object: Literal["event"] = "event"
    job_id: str
    seq: int
    at: Time
    type: str
    message: str
    data: dict[str, Any]

    @classmethod
    def of(cls, row: tables.Event) -> Event:
        """Return the JSON form of a row."""
        return cls(id=row.id, job_id=row.job_id, seq=row.seq, at=row.at, type=row.type, message=row.message, data=row.data)


class Artifact(BaseModel):
    """A file a job gave back."""

    id: str
    object: Literal["artifact"] = "artifact"
    job_id: str
    kind: str
    filename: str
    media_type: str
    bytes: int
    sha256: str
    created_at: Time

    @classmethod
    def of(cls, row: tables.Artifact) -> Artifact:
        """Return the JSON form of a row."""
        return cls(
            id=row.id, job_id=row.job_id, kind=row.kind, filename=row.filename, media_type=row.media_type, bytes=row.bytes,
            sha256=row.sha256, created_at=row.created_at,
        )  # fmt: skip


Scope = Literal["read", "write", "admin"]


class NewKey(Incoming):
    """A key to make."""

    name: Name
    scopes: list[Scope] = Field(min_length=1, max_length=3)
    expires_in_seconds: float | None = Field(default=None, ge=0, le=10 * 366 * 86_400)


class Key(BaseModel):
    """An API key, without its secret."""

    id: str
    object: Literal["key"] = "key"
    name: str
    hint: str
    scopes: list[str]
    created_at: Time
    expires_at: OptionalTime
    revoked_at: OptionalTime

    @classmethod
    def of(cls, row: tables.Key) -> Key:
        """Return the JSON form of a row."""
        return cls(id=row.id, name=row.name, hint=row.hint, scopes=row.scopes, created_at=row.created_at, expires_at=row.expires_at, revoked_at=row.revoked_at)


class MadeKey(Key):
    """A key just made; the secret is shown this once."""

    secret: str


class Me(BaseModel):
    """The key that asks."""

    object: Literal["me"] = "me"
    key_id: str
    name: str
    scopes: list[str]


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """Part of a list; `next_cursor` goes into `after`."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    next_cursor: str | None

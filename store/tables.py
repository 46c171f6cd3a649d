"""The tables. Times are seconds since 1970 by the database's clock; `*_at` everywhere."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Id = String(40)


class Table(DeclarativeBase):
    """Base of all tables; constraint names are fixed so that migrations can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Key(Table):
    """An API key; only its SHA-256 is kept."""

    __tablename__ = "key"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(Id)
    name: Mapped[str] = mapped_column(String(200))
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    hint: Mapped[str] = mapped_column(String(16))
    scopes: Mapped[list[str]] = mapped_column(Json)
    created_at: Mapped[float] = mapped_column(Float(53))
    expires_at: Mapped[float | None] = mapped_column(Float(53))
    revoked_at: Mapped[float | None] = mapped_column(Float(53))
    __table_args__ = (Index("ix_key_tenant", "tenant", "created_at", "id"),)


class Object(Table):
    """A blob of the object store, by content; removed when no row has needed it for a while."""

    __tablename__ = "object"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    touched_at: Mapped[float] = mapped_column(Float(53))


class Upload:
    """What models and datasets have in common: the original bytes, what intake made of them, what they are."""

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(Id)
    name: Mapped[str] = mapped_column(String(200))
    filename: Mapped[str] = mapped_column(String(255))
    status: Mapped[str] = mapped_column(String(16))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    safe_sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    details_sha256: Mapped[str | None] = mapped_column(String(64), index=True)
    description: Mapped[dict[str, Any] | None] = mapped_column(Json)
    refusal: Mapped[dict[str, Any] | None] = mapped_column(Json)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", Json)
    created_at: Mapped[float] = mapped_column(Float(53))
    reading_until: Mapped[float | None] = mapped_column(Float(53))


class Model(Upload, Table):
    """An uploaded or purified model."""

    __tablename__ = "model"
    origin_job_id: Mapped[str | None] = mapped_column(Id)
    __table_args__ = (Index("ix_model_tenant", "tenant", "created_at", "id"),)


class Dataset(Upload, Table):
    """An uploaded or cleansed data set.

    Attributes:
        resize: the side of the squares that its pictures are made when they are read; None takes them as they are.
    """

    __tablename__ = "dataset"
    resize: Mapped[int | None] = mapped_column(Integer)
    origin_job_id: Mapped[str | None] = mapped_column(Id)
    __table_args__ = (Index("ix_dataset_tenant", "tenant", "created_at", "id"),)


class Job(Table):
    """A job: the row is the truth, the queue only wakes workers."""

    __tablename__ = "job"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(Id)
    status: Mapped[str] = mapped_column(String(16))
    kind: Mapped[str] = mapped_column(String(16))
    method: Mapped[str] = mapped_column(String(64))
    model_id: Mapped[str | None] = mapped_column(Id, index=True)
    dataset_id: Mapped[str | None] = mapped_column(Id, index=True)
    test_dataset_id: Mapped[str | None] = mapped_column(Id, index=True)
    triggered_dataset_id: Mapped[str | None] = mapped_column(Id, index=True)
    suspect_dataset_id: Mapped[str | None] = mapped_column(Id, index=True)
    request: Mapped[dict[str, Any]] = mapped_column(Json)
    seed: Mapped[int] = mapped_column(BigInteger)
    max_seconds: Mapped[float] = mapped_column(Float(53))
    phase: Mapped[str | None] = mapped_column(String(64))
    progress: Mapped[dict[str, Any] | None] = mapped_column(Json)
    results: Mapped[dict[str, Any] | None] = mapped_column(Json)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    cleaned_model_id: Mapped[str | None] = mapped_column(Id)
    cleansed_dataset_id: Mapped[str | None] = mapped_column(Id)
    retry_of: Mapped[str | None] = mapped_column(Id)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", Json)
    attempt: Mapped[int] = mapped_column(Integer)
    crashes: Mapped[int] = mapped_column(Integer)
    last_seq: Mapped[int] = mapped_column(Integer)
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[float | None] = mapped_column(Float(53))
    announced_at: Mapped[float | None] = mapped_column(Float(53))
    created_at: Mapped[float] = mapped_column(Float(53))
    queued_at: Mapped[float] = mapped_column(Float(53))
    started_at: Mapped[float | None] = mapped_column(Float(53))
    finished_at: Mapped[float | None] = mapped_column(Float(53))
    cancel_requested_at: Mapped[float | None] = mapped_column(Float(53))
    __table_args__ = (
        Index("ix_job_tenant", "tenant", "created_at", "id"),
        # Separate paths for the two questions of the sweeper; one index for both made it scan.
        Index("ix_job_queued", "status", "queued_at"),
        Index("ix_job_lease", "status", "lease_until"),
    )


class Event(Table):
    """Something that happened in a job; `seq` counts from 1 without holes."""

    __tablename__ = "event"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    seq: Mapped[int] = mapped_column(Integer)
    at: Mapped[float] = mapped_column(Float(53))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(Json)
    __table_args__ = (UniqueConstraint("job_id", "seq"),)


class Artifact(Table):
    """A file a finished job gave back."""

    __tablename__ = "artifact"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), index=True)
    tenant: Mapped[str] = mapped_column(Id)
    kind: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(String(255))
    media_type: Mapped[str] = mapped_column(String(100))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[float] = mapped_column(Float(53))


class Checkpoint(Table):
    """The newest checkpoint of each stage of a running job."""

    __tablename__ = "checkpoint"
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    created_at: Mapped[float] = mapped_column(Float(53))


class Idempotency(Table):
    """The stored answer to a request that must not happen twice."""

    __tablename__ = "idempotency"
    key_id: Mapped[str] = mapped_column(ForeignKey("key.id", ondelete="CASCADE"), primary_key=True)
    route: Mapped[str] = mapped_column(String(100), primary_key=True)
    value: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    answer: Mapped[dict[str, Any]] = mapped_column(Json)
    expires_at: Mapped[float] = mapped_column(Float(53), index=True)


class Transfer(Table):
    """A file that arrives in parts.

    Attributes:
        offset: how many bytes have arrived through the API and are kept.
        part_bytes: the size of the parts that the client puts into the object store itself; None when they come through the API.
        result_id: the model or dataset it became.
    """

    __tablename__ = "transfer"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(Id)
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(200))
    filename: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)
    offset: Mapped[int] = mapped_column(BigInteger)
    part_bytes: Mapped[int | None] = mapped_column(BigInteger)
    result_id: Mapped[str | None] = mapped_column(Id)
    created_at: Mapped[float] = mapped_column(Float(53))
    expires_at: Mapped[float] = mapped_column(Float(53), index=True)


class TransferPart(Table):
    """Bytes of a transfer, kept as an object."""

    __tablename__ = "transfer_part"
    transfer_id: Mapped[str] = mapped_column(ForeignKey("transfer.id", ondelete="CASCADE"), primary_key=True)
    offset: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64), index=True)


class Deed(Table):
    """One entry of the audit log.

    Attributes:
        action: the API's operation. subject: the id it was about, or empty. status: of the answer.
    """

    __tablename__ = "deed"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(Id)
    key_id: Mapped[str] = mapped_column(Id)
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(Id)
    status: Mapped[int] = mapped_column(Integer)
    request_id: Mapped[str] = mapped_column(Id)
    address: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float(53))
    __table_args__ = (Index("ix_deed_tenant", "tenant", "created_at", "id"),)

"""Models and datasets: uploaded, read by intake, listed, deleted when nothing needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from store import ids, states
from store.database import now
from store.errors import InUse, NotFound, NotReady
from store.tables import Artifact, Checkpoint, Dataset, Job, Model, Object, TransferPart

Row = TypeVar("Row", Model, Dataset)
RECEIVED, READY, REJECTED = "received", "ready", "rejected"
PREFIX = {Model: "mdl", Dataset: "dset"}


def add(
    session: Session,
    table: type[Row],
    *,
    tenant: str,
    name: str,
    filename: str,
    sha256: str,
    size: int,
    labels: dict[str, str],
    reading_seconds: float,
    resize: int | None = None,
) -> Row:
    """Insert an upload that waits to be read; whoever adds it has `reading_seconds` to do so. Only data sets are resized."""
    moment: float = session.scalar(sa.select(now()))  # type: ignore[assignment]
    row = table(
        id=ids.new(PREFIX[table]), tenant=tenant, name=name, filename=filename, status=RECEIVED, bytes=size, sha256=sha256,
        labels=labels, created_at=moment, reading_until=moment + reading_seconds, **({"resize": resize} if resize is not None else {}),
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row


def get(session: Session, table: type[Row], row_id: str, tenant: str) -> Row:
    """Return a tenant's model or dataset.

    Raises `NotFound`, the same for another tenant's.
    """
    row = session.scalar(sa.select(table).where(table.id == row_id, table.tenant == tenant))
    if row is None:
        raise NotFound(f"there is no {table.__tablename__} {row_id}")
    return row


def ready(session: Session, table: type[Row], row_id: str, tenant: str) -> Row:
    """Return a model or dataset that a job can use.

    Raises `NotFound`, `NotReady`.
    """
    row = get(session, table, row_id, tenant)
    if row.status != READY:
        why = f": {row.refusal['message']}" if row.refusal else "; ask again in a moment"
        raise NotReady(f"{table.__tablename__} {row_id} is {row.status}{why}")
    return row


def settle(
    session: Session,
    table: type[Row],
    row_id: str,
    *,
    description: dict[str, Any] | None = None,
    safe_sha256: str | None = None,
    details_sha256: str | None = None,
    refusal: dict[str, Any] | None = None,
) -> None:
    """Store what intake said of an upload; only the first verdict counts."""
    session.execute(
        sa.update(table)
        .where(table.id == row_id, table.status == RECEIVED)
        .values(
            status=REJECTED if refusal else READY,
            description=description,
            safe_sha256=safe_sha256,
            details_sha256=details_sha256,
            refusal=refusal,
            reading_until=None,
        )
        .execution_options(synchronize_session=False)
    )


def abandoned(session: Session, table: type[Row], *, reading_seconds: float) -> list[Row]:
    """Return uploads whose reader died, now owned by the caller for `reading_seconds`."""
    due = sa.select(table.id).where(table.status == RECEIVED, table.reading_until < now()).limit(10)
    mine = []
    for row_id in session.scalars(due):
        taken = session.execute(
            sa.update(table)
            .where(table.id == row_id, table.status == RECEIVED, table.reading_until < now())
            .values(reading_until=now() + reading_seconds)
            .execution_options(synchronize_session=False)
        )
        if taken.rowcount:  # type: ignore[attr-defined]
            mine.append(session.get_one(table, row_id, populate_existing=True))
    return mine


def delete(session: Session, table: type[Row], row_id: str, tenant: str) -> None:
    """Delete a model or dataset; its bytes go when nothing else has the same.

    Raises `NotFound`; `InUse` while a job under way needs it or it is being read.
    """
    row = get(session, table, row_id, tenant)
    columns = (Job.model_id,) if table is Model else (Job.dataset_id, Job.test_dataset_id, Job.triggered_dataset_id, Job.suspect_dataset_id)
    uses = sa.or_(*(column == row_id for column in columns))
    job_id = session.scalar(sa.select(Job.id).where(Job.status.not_in(states.TERMINAL), uses).limit(1))
    if job_id is not None:
        raise InUse(f"job {job_id} needs {table.__tablename__} {row_id}; cancel it or wait for its end")
    if row.status == RECEIVED:
        raise InUse(f"{table.__tablename__} {row_id} is being read; ask again in a moment")
    session.delete(row)


def page(
    session: Session, table: Any, tenant: str, *, limit: int, after: str | None, where: Sequence[Any] = (), newest_first: bool = True
) -> tuple[list[Any], str | None]:
    """Return one keyset page of a tenant's rows and the cursor of the next, by (created_at, id).

    Raises `NotFound` when the cursor's row is gone or not the tenant's.
    """
    order = (table.created_at, table.id)
    query = sa.select(table).where(table.tenant == tenant, *where)
    if after is not None:
        mark = session.execute(sa.select(*order).where(table.id == after, table.tenant == tenant)).first()
        if mark is None:
            raise NotFound(f"the cursor {after} points to nothing")
        pair = sa.tuple_(*order)
        limit_pair = sa.tuple_(sa.literal(mark[0]), sa.literal(mark[1]))
        query = query.where(pair < limit_pair if newest_first else pair > limit_pair)
    query = query.order_by(*(column.desc() if newest_first else column.asc() for column in order))
    rows = list(session.scalars(query.limit(limit + 1)))
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


# -- objects -------------------------------------------------------------------------------------------------------


def touch(session: Session, sha256: str, size: int) -> None:
    """Note that an object was just stored or is about to be referred to."""
    known = session.get(Object, sha256)
    moment: float = session.scalar(sa.select(now()))  # type: ignore[assignment]
    if known is not None:
        known.touched_at = moment
        session.flush()
        return
    values = {"sha256": sha256, "bytes": size, "touched_at": moment}
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert

        session.execute(insert(Object).values(values).on_conflict_do_update(index_elements=["sha256"], set_={"touched_at": moment}))
    else:
        session.add(Object(**values))
        session.flush()


def unreferenced(session: Session, *, older_than_seconds: float) -> list[str]:
    """Return objects that no row has needed for a while, and forget them; the caller removes the bytes."""
    needed = [
        sa.select(column)
        for column in (
            Model.sha256, Model.safe_sha256, Dataset.sha256, Dataset.safe_sha256, Dataset.details_sha256, Artifact.sha256, Checkpoint.sha256,
            TransferPart.sha256,
        )
    ]  # fmt: skip
    old = sa.select(Object.sha256).where(Object.touched_at < now() - older_than_seconds)
    for query in needed:
        column = query.selected_columns[0]
        old = old.where(~sa.exists(query.where(column == Object.sha256).correlate(Object)))
    found = list(session.scalars(old.limit(500)))
    if found:
        session.execute(sa.delete(Object).where(Object.sha256.in_(found)))
    return found

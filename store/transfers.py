"""Uploads that arrive in parts: begun, continued at an offset, completed or forgotten."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from store import ids
from store.database import now
from store.errors import NotFound, OffsetMismatch
from store.jobs import moment
from store.tables import Transfer, TransferPart


def begin(session: Session, *, tenant: str, kind: str, name: str, filename: str, size: int, part_bytes: int | None, seconds: float) -> Transfer:
    """Announce a file of `size` bytes; it is forgotten after `seconds` without a part."""
    at = moment(session)
    row = Transfer(
        id=ids.new("upl"), tenant=tenant, kind=kind, name=name, filename=filename, bytes=size, offset=0, part_bytes=part_bytes,
        created_at=at, expires_at=at + seconds,
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row


def get(session: Session, transfer_id: str, tenant: str) -> Transfer:
    """Return a tenant's transfer; raises `NotFound`, the same for another tenant's and for an expired one."""
    row = session.scalar(sa.select(Transfer).where(Transfer.id == transfer_id, Transfer.tenant == tenant, Transfer.expires_at > now()))
    if row is None:
        raise NotFound(f"there is no upload {transfer_id}; it may have expired")
    return row


def append(session: Session, transfer_id: str, tenant: str, *, offset: int, size: int, sha256: str, seconds: float) -> int:
    """Note a part that is in the object store; return the new offset.

    Raises `NotFound`; `OffsetMismatch` when another part was there first.
    """
    row = get(session, transfer_id, tenant)
    moved = session.execute(
        sa.update(Transfer)
        .where(Transfer.id == transfer_id, Transfer.offset == offset, Transfer.result_id.is_(None))
        .values(offset=offset + size, expires_at=now() + seconds)
        .execution_options(synchronize_session=False)
    )
    if not moved.rowcount:  # type: ignore[attr-defined]
        session.refresh(row)
        raise OffsetMismatch(f"the upload goes on at byte {row.offset}, not at {offset}", row.offset)
    session.add(TransferPart(transfer_id=transfer_id, offset=offset, bytes=size, sha256=sha256))
    session.flush()
    return offset + size


def missing(row: Transfer, arrived: dict[int, int]) -> list[tuple[int, int]]:
    """Return offset and size of the parts that are not in the object store, or not as large as they must be; `arrived` is {offset: bytes}."""
    assert row.part_bytes is not None
    wanted = [(offset, min(row.part_bytes, row.bytes - offset)) for offset in range(0, row.bytes, row.part_bytes)]
    return [(offset, size) for offset, size in wanted if arrived.get(offset) != size]


def renew(session: Session, transfer_id: str, tenant: str, *, seconds: float) -> Transfer:
    """Keep a transfer for `seconds` more; raises `NotFound`."""
    row = get(session, transfer_id, tenant)
    row.expires_at = moment(session) + seconds
    session.flush()
    return row


def known(session: Session) -> set[str]:
    """Return the ids of all transfers."""
    return set(session.scalars(sa.select(Transfer.id)))


def parts(session: Session, row: Transfer) -> list[TransferPart]:
    """Return the parts in order; raises `OffsetMismatch` while some are missing."""
    if row.offset != row.bytes:
        raise OffsetMismatch(f"{row.offset} of {row.bytes} bytes have arrived; send the rest first", row.offset)
    return list(session.scalars(sa.select(TransferPart).where(TransferPart.transfer_id == row.id).order_by(TransferPart.offset)))


def complete(session: Session, transfer_id: str, tenant: str, result_id: str) -> None:
    """Note what the file became and let go of its parts; asked again, the answer stays the same until it expires."""
    row = get(session, transfer_id, tenant)
    row.result_id = result_id
    session.execute(sa.delete(TransferPart).where(TransferPart.transfer_id == transfer_id))


def delete(session: Session, transfer_id: str, tenant: str) -> None:
    """Forget a transfer and its parts; raises `NotFound`."""
    session.delete(get(session, transfer_id, tenant))


def forget_expired(session: Session) -> None:
    """Forget what nobody went on with; its objects go with the next tidying."""
    session.execute(sa.delete(Transfer).where(Transfer.expires_at <= now()))

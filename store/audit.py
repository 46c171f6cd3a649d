"""The audit log: who changed or took away what; rows are only ever added, and forgotten when they are old."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from store import ids
from store.database import now
from store.jobs import moment
from store.tables import Deed


def note(session: Session, *, tenant: str, key_id: str, action: str, subject: str, status: int, request_id: str, address: str) -> None:
    """Add a row.

    Args:
        action: the operation's name in the API. subject: the id it was about, empty when there is none.
        status: the HTTP status of the answer.
    """
    # Cut to what the columns hold: a path may be as long as a client likes.
    said: dict[str, Any] = {"action": action[:64], "subject": subject[:40], "request_id": request_id[:40], "address": address[:64], "status": status}
    session.add(Deed(id=ids.new("aud"), tenant=tenant, key_id=key_id, created_at=moment(session), **said))


def forget_old(session: Session, *, older_than_seconds: float) -> None:
    """Remove what is older than the operator wants to keep."""
    session.execute(sa.delete(Deed).where(Deed.created_at < now() - older_than_seconds))

"""A request with an `Idempotency-Key` happens once; its answer is stored in the same transaction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from store.database import Database, now
from store.errors import KeyReused
from store.tables import Idempotency

KEPT_SECONDS = 24 * 3600


def once(
    database: Database, *, key_id: str, route: str, value: str | None, request: Any, act: Callable[[Session], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Return `(act(session), False)`, or `(the stored answer, True)` if this key was used for the same request.

    Concurrent uses of one key wait for each other in the database: the second is a replay.

    Raises `KeyReused` when the key was used for another request.
    """
    fingerprint = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    try:
        with database.write() as session:
            found = _stored(session, key_id, route, value, fingerprint)
            if found is not None:
                return found, True
            answer = act(session)
            if value is not None:
                expires: float = session.scalar(sa.select(now() + KEPT_SECONDS))  # type: ignore[assignment]
                session.add(Idempotency(key_id=key_id, route=route, value=value, fingerprint=fingerprint, answer=answer, expires_at=expires))
            return answer, False
    except IntegrityError:
        with database.read() as session:
            found = _stored(session, key_id, route, value, fingerprint)
        if found is None:
            raise
        return found, True


def _stored(session: Session, key_id: str, route: str, value: str | None, fingerprint: str) -> dict[str, Any] | None:
    if value is None:
        return None
    row = session.get(Idempotency, (key_id, route, value))
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise KeyReused(f"the Idempotency-Key {value!r} was used for another request")
    return row.answer


def forget_expired(session: Session) -> None:
    """Drop answers that are over a day old."""
    session.execute(sa.delete(Idempotency).where(Idempotency.expires_at < now()))

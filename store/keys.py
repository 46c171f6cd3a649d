"""API keys: shown once, stored as SHA-256, looked up by that."""

from __future__ import annotations

import hashlib
import secrets

import sqlalchemy as sa
from sqlalchemy.orm import Session

from store import ids
from store.database import now
from store.errors import NotFound
from store.tables import Key

SCOPES = ("read", "write", "admin")


def digest(secret: str) -> bytes:
    """Return what is stored of a key."""
    return hashlib.sha256(secret.encode()).digest()


def create(
    session: Session, *, tenant: str | None, name: str, scopes: list[str], expires_at: float | None = None, secret: str | None = None
) -> tuple[Key, str]:
    """Make a key, of a new tenant when none is named; return it with its secret, which is not kept."""
    secret = secret or f"upk_{secrets.token_urlsafe(32)}"
    moment: float = session.scalar(sa.select(now()))  # type: ignore[assignment]
    key = Key(
        id=ids.new("key"), tenant=tenant or ids.new("ten"), name=name, digest=digest(secret), hint=secret[:8], scopes=scopes,
        created_at=moment, expires_at=expires_at,
    )  # fmt: skip
    session.add(key)
    session.flush()
    return key, secret


def find(session: Session, secret: str) -> tuple[Key | None, float]:
    """Return the key with this secret, and the database's time; the lookup is by digest, so timing tells nothing."""
    row = session.execute(sa.select(Key, now()).where(Key.digest == digest(secret))).first()
    return (row[0], row[1]) if row else (None, 0.0)


def revoke(session: Session, key_id: str, tenant: str) -> None:
    """Make a key useless.

    Raises `NotFound`.
    """
    done = session.execute(sa.update(Key).where(Key.id == key_id, Key.tenant == tenant, Key.revoked_at.is_(None)).values(revoked_at=now()))
    if not done.rowcount:  # type: ignore[attr-defined]
        raise NotFound(f"there is no key {key_id}")


def any_exists(session: Session) -> bool:
    """Say whether a key was ever made."""
    return session.scalar(sa.select(Key.id).limit(1)) is not None

"""What every request needs: the store, and who is asking."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from celery import Celery
from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from intake import door
from service.problems import Problem
from service.reading import Reader
from store.database import Database, now
from store.keys import digest
from store.objects import Objects
from store.settings import Settings
from store.tables import Key


@dataclass(frozen=True)
class Context:
    """The floors below, opened once a process."""

    settings: Settings
    database: Database
    objects: Objects
    celery: Celery
    reader: Reader

    def fence(self) -> dict[str, Any]:
        """Return what the fence's self-test proved when it first ran: `{layers, denies}`."""
        return _proved()


@functools.cache
def _proved() -> dict[str, Any]:
    return door.self_test()


@dataclass(frozen=True)
class Caller:
    """Who is asking."""

    key_id: str
    tenant: str
    name: str
    scopes: tuple[str, ...]


async def context(request: Request) -> Context:
    """Return the process's context; a coroutine, so that FastAPI needs no thread for it."""
    found: Context = request.app.state.context
    return found


bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer upk_…`.")
_KEY = sa.select(Key.id, Key.tenant, Key.name, Key.scopes, Key.expires_at, Key.revoked_at, now()).where(Key.digest == sa.bindparam("digest"))


def _authenticate(opened: Context, credentials: HTTPAuthorizationCredentials | None, scope: str) -> Caller:
    if credentials is None:
        raise Problem("unauthenticated", "Send `Authorization: Bearer upk_…`.")
    with opened.database.read() as session:
        # The digest of a 256-bit secret is looked up, never compared byte by byte with a stored secret.
        row = session.connection().execute(_KEY, {"digest": digest(credentials.credentials)}).first()
    if row is None or row.revoked_at is not None:
        raise Problem("unauthenticated", "This API key is not known, or was revoked.")
    if row.expires_at is not None and row.expires_at <= row[6]:
        raise Problem("key_expired", "This API key has expired; ask for a new one.")
    if scope not in row.scopes:
        raise Problem("insufficient_scope", f"This needs the scope `{scope}`; the key has {', '.join(row.scopes) or 'none'}.")
    return Caller(row.id, row.tenant, row.name, tuple(row.scopes))


async def _known(request: Request, opened: Context, credentials: HTTPAuthorizationCredentials | None, scope: str) -> Caller:
    caller = await opened.database.ask(lambda: _authenticate(opened, credentials, scope))
    # For the audit log, which is written when the answer is known.
    request.state.caller = caller
    return caller


Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]


async def reads(request: Request, opened: Annotated[Context, Depends(context)], credentials: Credentials) -> Caller:
    """Demand a key that may read."""
    return await _known(request, opened, credentials, "read")


async def writes(request: Request, opened: Annotated[Context, Depends(context)], credentials: Credentials) -> Caller:
    """Demand a key that may write."""
    return await _known(request, opened, credentials, "write")


async def administers(request: Request, opened: Annotated[Context, Depends(context)], credentials: Credentials) -> Caller:
    """Demand a key that may manage keys."""
    return await _known(request, opened, credentials, "admin")


Opened = Annotated[Context, Depends(context)]
Reading = Annotated[Caller, Depends(reads)]
Writing = Annotated[Caller, Depends(writes)]
Administering = Annotated[Caller, Depends(administers)]

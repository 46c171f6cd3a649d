"""`/v1/keys` and `/v1/me`."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response

from service import schemas
from service.context import Administering, Opened, Reading
from service.lists import After, Limit, Order, linked
from service.problems import documented
from store import keys, library
from store.database import now
from store.tables import Key

router = APIRouter(tags=["keys"])


@router.post(
    "/v1/keys", status_code=201, response_model=schemas.MadeKey, operation_id="create_key", summary="Make a key", responses=documented("malformed_body")
)
def create(body: schemas.NewKey, response: Response, opened: Opened, caller: Administering) -> Any:
    """Make a key of the caller's tenant; its secret is shown this once."""
    with opened.database.write() as session:
        expires = session.scalar(sa.select(now() + body.expires_in_seconds)) if body.expires_in_seconds is not None else None
        row, secret = keys.create(session, tenant=caller.tenant, name=body.name, scopes=list(dict.fromkeys(body.scopes)), expires_at=expires)
    response.headers["Cache-Control"] = "no-store"
    return schemas.MadeKey(**vars(schemas.Key.of(row)), secret=secret)


@router.get("/v1/keys", response_model=schemas.Page[schemas.Key], operation_id="list_keys", summary="List keys", responses=documented("not_found"))
def listing(request: Request, response: Response, opened: Opened, caller: Administering, limit: Limit = 20, after: After = None, order: Order = "desc") -> Any:
    """List the tenant's keys, without their secrets."""
    with opened.database.read() as session:
        rows, cursor = library.page(session, Key, caller.tenant, limit=limit, after=after, newest_first=order == "desc")
    return linked(request, response, [schemas.Key.of(row) for row in rows], cursor)


@router.delete("/v1/keys/{key_id}", status_code=204, operation_id="revoke_key", summary="Revoke a key", responses=documented("not_found"))
def revoke(key_id: str, opened: Opened, caller: Administering) -> None:
    """Make a key useless, at once and for ever."""
    with opened.database.write() as session:
        keys.revoke(session, key_id, caller.tenant)


@router.get("/v1/me", response_model=schemas.Me, operation_id="get_me", summary="Who am I", responses=documented())
def me(caller: Reading) -> Any:
    """Describe the key that asks."""
    return schemas.Me(key_id=caller.key_id, name=caller.name, scopes=list(caller.scopes))

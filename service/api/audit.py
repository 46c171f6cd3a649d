"""`/v1/audit`: who changed or took away what."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service import schemas
from service.context import Administering, Opened
from service.lists import After, Limit, Order, linked
from service.problems import documented
from store import library
from store.tables import Deed

router = APIRouter(tags=["audit"])


@router.get("/v1/audit", response_model=schemas.Page[schemas.Deed], operation_id="list_audit", summary="Read the audit log", responses=documented("not_found"))
def listing(request: Request, response: Response, opened: Opened, caller: Administering, limit: Limit = 20, after: After = None, order: Order = "desc") -> Any:
    """List the tenant's uploads, jobs, downloads and deletions, and who did them; refused ones too."""
    with opened.database.read() as session:
        rows, cursor = library.page(session, Deed, caller.tenant, limit=limit, after=after, newest_first=order == "desc")
    return linked(request, response, [schemas.Deed.of(row) for row in rows], cursor)

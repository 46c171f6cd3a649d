"""`/v1/methods`: the catalogue, from the engine's own declarations."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from core import catalog
from service import schemas
from service.context import Reading
from service.problems import Problem, documented

router = APIRouter(prefix="/v1/methods", tags=["methods"])


@router.get("", response_model=schemas.Page[schemas.Method], operation_id="list_methods", summary="List methods", responses=documented())
def listing(caller: Reading, kind: Annotated[catalog.Kind | None, Query()] = None) -> Any:
    """Return every defense and attack with its parameters."""
    found = [method.describe() for method in catalog.methods().values() if kind in (None, method.kind)]
    return {"object": "list", "data": found, "has_more": False, "next_cursor": None}


@router.get("/{name}", response_model=schemas.Method, operation_id="get_method", summary="Get a method", responses=documented("not_found"))
def get(name: str, caller: Reading) -> Any:
    """Return one method with its parameters' schema and defaults."""
    method = catalog.methods().get(name)
    if method is None:
        raise Problem("not_found", f"There is no method {name!r}; there are {', '.join(catalog.methods())}.")
    return method.describe()

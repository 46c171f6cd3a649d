"""`/v1/methods`: the catalogue, from the engine's own declarations."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from core import advice, catalog
from service import schemas
from service.context import Reading
from service.problems import Problem, documented

router = APIRouter(prefix="/v1", tags=["methods"])


@router.get("/methods", response_model=schemas.Page[schemas.Method], operation_id="list_methods", summary="List methods", responses=documented())
def listing(caller: Reading, kind: Annotated[catalog.Kind | None, Query()] = None) -> Any:
    """Return every defense and attack with its parameters."""
    found = [method.describe() for method in catalog.methods().values() if kind in (None, method.kind)]
    return {"object": "list", "data": found, "has_more": False, "next_cursor": None}


@router.get("/methods/{name}", response_model=schemas.Method, operation_id="get_method", summary="Get a method", responses=documented("not_found"))
def get(name: str, caller: Reading) -> Any:
    """Return one method with its parameters' schema and defaults."""
    method = catalog.methods().get(name)
    if method is None:
        raise Problem("not_found", f"There is no method {name!r}; there are {', '.join(catalog.methods())}.")
    return method.describe()


@router.get(
    "/proposals", response_model=schemas.Page[schemas.Proposal], operation_id="list_proposals", summary="Propose methods", responses=documented()
)  # fmt: skip
def proposals(caller: Reading, have: Annotated[list[catalog.Need], Query(description="What there is; may be repeated.", min_length=1)]) -> Any:
    """Return which jobs are worth trying with what there is, by kind, the best first, and why."""
    found = [
        {"kind": one.kind.value, "defense": one.defense, "needs": sorted(need.value for need in one.needs), "why": one.why} for one in advice.propose(have)
    ]
    return {"object": "list", "data": found, "has_more": False, "next_cursor": None}

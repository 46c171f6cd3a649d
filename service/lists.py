"""Keyset pages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query, Request, Response

from service import schemas

Limit = Annotated[int, Query(ge=1, le=100, description="Items a page.")]
After = Annotated[schemas.Identifier | None, Query(description="The last page's `next_cursor`.")]
Order = Annotated[Literal["asc", "desc"], Query(description="By time of creation.")]


def linked(request: Request, response: Response, items: list[Any], cursor: str | None) -> dict[str, Any]:
    """Return a page and set its `Link` header."""
    if cursor is not None:
        following = request.url.include_query_params(after=cursor)
        response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    response.headers["Cache-Control"] = "no-store"
    return {"object": "list", "data": items, "has_more": cursor is not None, "next_cursor": cursor}

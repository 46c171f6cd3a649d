"""Health, version and metrics; no key needed, nothing of a tenant in them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import REGISTRY

from service.context import Opened
from store.database import now
from store.errors import StoreError
from store.tables import Job

router = APIRouter(tags=["health"])


@router.get("/livez", operation_id="livez", summary="Is the process alive")
def livez() -> dict[str, str]:
    """Touch nothing."""
    return {"status": "ok"}


@router.get("/readyz", operation_id="readyz", summary="Can the service work", responses={503: {"description": "Something it needs is missing."}})
def readyz(opened: Opened) -> JSONResponse:
    """Check database, migrations, object store and sandbox; a dead queue only delays jobs."""
    checks: dict[str, Any] = {}
    try:
        current, newest = opened.database.revision()
        checks["database"] = "ok" if current == newest else f"migration {current}, newest {newest}"
    except (StoreError, sa.exc.SQLAlchemyError) as error:
        checks["database"] = f"down: {type(error).__name__}"
    try:
        opened.objects.exists("0" * 64)
        checks["objects"] = "ok"
    except StoreError as error:
        checks["objects"] = f"down: {error.detail}"
    checks["queue"] = queue_state(opened)
    proved = opened.fence()
    checks["sandbox"] = {"required": opened.settings.sandbox == "required", **proved}
    good = checks["database"] == checks["objects"] == "ok" and (opened.settings.sandbox != "required" or (all(proved["denies"].values()) and proved["denies"]))
    return JSONResponse({"status": "ok" if good else "unavailable", "checks": checks}, 200 if good else 503)


def queue_state(opened: Any) -> str:
    """Return "ok" or why the queue does not answer."""
    try:
        with opened.celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=2)
    except Exception as error:
        return f"degraded: {type(error).__name__}; jobs are stored and start when it is back"
    return "ok"


@router.get("/version", operation_id="version", summary="Versions")
def versions() -> dict[str, str]:
    """Return the versions that matter."""
    return {"unpoison": version("unpoison"), "torch": version("torch"), "api": "v1"}


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(opened: Opened) -> Response:
    """Return the process's metrics and the state of the job table."""
    registry = CollectorRegistry()
    gauge = Gauge("unpoison_jobs", "Jobs by method and status.", ["method", "status"], registry=registry)
    oldest = Gauge("unpoison_queue_oldest_seconds", "Age of the oldest queued job.", registry=registry)
    with opened.database.read() as session:
        for method, status, count in session.execute(sa.select(Job.method, Job.status, sa.func.count()).group_by(Job.method, Job.status)):
            gauge.labels(method, status).set(count)
        oldest.set(session.scalar(sa.select(now() - sa.func.min(Job.queued_at)).where(Job.status == "queued")) or 0)
    return Response(generate_latest(REGISTRY) + generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

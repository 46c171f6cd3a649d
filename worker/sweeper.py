"""What the workers do beside their jobs: take back the jobs of dead ones, ring again for what waits, throw away what nothing needs."""

from __future__ import annotations

from collections.abc import Callable

from store import audit, idempotency, jobs, library, transfers
from store.database import Database
from store.errors import LostLease
from store.objects import Objects
from store.settings import Settings


def sweep(settings: Settings, database: Database, announce: Callable[[str], bool]) -> None:
    """Take back the jobs of dead workers, and ring again for what waits.

    Raises `StoreError` when a floor does not answer; the next sweep tries again.
    """
    with database.read() as session:
        dead = jobs.expired(session)
    for job_id, fence in dead:
        try:
            with database.write() as session:
                jobs.crashed(session, job_id, fence, reason="its worker was not heard of any more", max_crashes=settings.max_crashes, only_expired=True)
        except LostLease:
            continue
    with database.write() as session:
        waiting = jobs.unannounced(session, older_than_seconds=max(6 * settings.sweep_seconds, 5.0))
    for job_id in waiting:
        if not announce(job_id):
            break


def tidy(settings: Settings, database: Database, objects: Objects) -> None:
    """Remove objects that no row needs, what killed processes left half written, and old answers.

    Raises `StoreError`.
    """
    # Listed first: an upload's row is older than its first part.
    owners = objects.part_owners()
    with database.write() as session:
        gone = library.unreferenced(session, older_than_seconds=3600)
        idempotency.forget_expired(session)
        transfers.forget_expired(session)
        uploads = transfers.known(session)
        audit.forget_old(session, older_than_seconds=86_400 * settings.audit_days)
    for sha256 in gone:
        objects.delete(sha256)
    # A URL outlives its upload for a while, so parts may come that nobody waits for.
    for owner in owners - uploads:
        objects.forget_parts(owner)
    # Longer than the longest reading of an upload, which keeps a folder there.
    objects.forget_incoming(settings.scratch, older_than_seconds=settings.intake_seconds + 3600)

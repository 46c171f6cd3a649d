"""What one tenant may keep and have waiting; the limits are settings, none by default."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from store import states
from store.database import now
from store.errors import QuotaExceeded
from store.settings import Settings
from store.tables import Dataset, Job, Model, Transfer


def check_upload(session: Session, settings: Settings, tenant: str, size: int) -> None:
    """Refuse a file of `size` bytes that is over the tenant's limits, counting what is announced in parts; raises `QuotaExceeded`."""
    if settings.quota_uploads is None and settings.quota_bytes is None:
        return
    count, total = 0, size
    for table in (Model, Dataset):
        rows, kept = session.execute(sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(table.bytes), 0)).where(table.tenant == tenant)).one()
        count, total = count + rows, total + int(kept)
    open_ = sa.and_(Transfer.tenant == tenant, Transfer.result_id.is_(None), Transfer.expires_at > now())
    rows, coming = session.execute(sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(Transfer.bytes), 0)).where(open_)).one()
    count, total = count + rows, total + int(coming)
    if settings.quota_uploads is not None and count >= settings.quota_uploads:
        raise QuotaExceeded(f"{count} models and data sets are kept, at most {settings.quota_uploads} are allowed; delete some first")
    if settings.quota_bytes is not None and total > settings.quota_bytes:
        raise QuotaExceeded(f"with this file {total} bytes would be kept, at most {settings.quota_bytes} are allowed; delete something first")


def check_job(session: Session, settings: Settings, tenant: str) -> None:
    """Refuse one more job than the tenant may have under way; raises `QuotaExceeded`."""
    if settings.quota_jobs is None:
        return
    count = session.scalar(sa.select(sa.func.count()).where(Job.tenant == tenant, Job.status.not_in(states.TERMINAL))) or 0
    if count >= settings.quota_jobs:
        raise QuotaExceeded(f"{count} jobs are under way, at most {settings.quota_jobs} are allowed; wait for one to end or cancel it")

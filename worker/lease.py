"""Signs of life: a thread renews an attempt's lease, however long a file takes to store, and hears of a cancel."""

from __future__ import annotations

import contextvars
import threading
import time
from typing import Self

import structlog

from store import jobs
from store.database import Database
from store.errors import LostLease, StoreUnavailable
from store.settings import Settings
from store.tables import Job

logger = structlog.get_logger()
CANCEL_SECONDS = 0.5


class Lease:
    """Held while it is entered.

    Attributes:
        lost: another attempt owns the job, or it has ended.
        cancelled: somebody asked the job to stop.
    """

    def __init__(self, settings: Settings, database: Database, job: Job, *, until: float) -> None:
        """Prepare to renew a job that was just claimed.

        Args:
            until: monotonic seconds; after that the lease is left to run out, for a job that should have ended long ago.
        """
        self._settings, self._database, self._job, self._until = settings, database, job, until
        self._left = threading.Event()
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._hold,), daemon=True)
        self.lost = self.cancelled = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        # Not waited for: a database that is away would hold up the next job, and the fence ignores a late sign of life.
        self._left.set()

    def _hold(self) -> None:
        beaten_at = time.monotonic()
        while not self._left.wait(min(CANCEL_SECONDS, self._settings.beat_seconds)) and time.monotonic() < self._until:
            # The lease runs from when it is written, which a busy database may do late.
            moment = time.monotonic()
            try:
                if moment - beaten_at >= self._settings.beat_seconds:
                    with self._database.write() as session:
                        self.cancelled = jobs.beat(session, self._job.id, self._job.attempt, lease_seconds=self._settings.lease_seconds)
                    beaten_at = moment
                else:
                    with self._database.read() as session:
                        self.cancelled = jobs.cancel_requested(session, self._job.id, self._job.attempt)
            except StoreUnavailable as error:
                # Waited for: whoever took the job meanwhile shows in the fence.
                logger.warning("cannot renew the lease", error=error.detail)
            except LostLease:
                self.lost = True
                return

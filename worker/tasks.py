"""The Celery application of a worker: one task, a sweeper beside it, a clean way to leave."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import structlog
from billiard import get_context
from billiard.context import BaseContext
from celery.signals import worker_process_init, worker_ready, worker_shutting_down

from store import queue
from store.database import Database
from store.errors import StoreError
from store.objects import Objects
from store.settings import Settings
from worker import supervisor, sweeper

logger = structlog.get_logger()
settings = Settings()
app = queue.app(settings.queue)
_context: BaseContext = get_context("fork")
# Made before the pool forks, so that parent and child share it.
_leaving = _context.Event()
_floors: dict[int, tuple[Database, Objects]] = {}


def floors() -> tuple[Database, Objects]:
    """Return this process's own connections: a fork must not share its parent's."""
    if os.getpid() not in _floors:
        _floors[os.getpid()] = (Database(settings.database), Objects(settings.objects))
    return _floors[os.getpid()]


@app.task(name=queue.RUN_JOB, ignore_result=True)
def run_job(job_id: str) -> None:
    """Run a job, if it is still there to be run; safe to call twice, late, or never."""
    if _leaving.is_set():
        return
    database, objects = floors()
    try:
        supervisor.run(settings, database, objects, job_id, owner=f"{socket.gethostname()}:{os.getpid()}", draining=_leaving.is_set)
    except StoreError as error:
        logger.warning("job not started, the sweeper will ring again", job_id=job_id, error=error.detail)


@worker_process_init.connect
def _in_child(**ignored: Any) -> None:
    # A pool process that outlives its worker would go on with a job nobody watches.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@worker_ready.connect
def _start_sweeper(**ignored: Any) -> None:
    _clean_scratch(settings.scratch / "jobs")
    threading.Thread(target=_sweep_for_ever, daemon=True).start()


@worker_shutting_down.connect
def _leave(**ignored: Any) -> None:
    _leaving.set()


def _sweep_for_ever() -> None:
    database, objects = floors()
    tidied_at = 0.0
    while not _leaving.is_set():
        try:
            queue.make_folder(settings.queue)
            settings.scratch.mkdir(parents=True, exist_ok=True)
            (settings.scratch / "worker-alive").touch()
            sweeper.sweep(settings, database, lambda job_id: queue.announce(app, job_id))
            if time.monotonic() - tidied_at > 600:
                tidied_at = time.monotonic()
                sweeper.tidy(settings, database, objects)
        except (StoreError, OSError) as error:
            logger.warning("sweep failed, next one tries again", error=str(error))
        time.sleep(settings.sweep_seconds)


def _clean_scratch(folder: Path) -> None:
    """Remove what attempts of dead processes left behind on this machine."""
    for left in folder.glob("*-*-*"):
        process = left.name.rsplit("-", 1)[-1]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(left, ignore_errors=True)


def configure_logs() -> None:
    """JSON lines on stderr, with the job's id."""
    logging.basicConfig(level=logging.WARNING)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )

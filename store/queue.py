"""The queue is a doorbell: it carries job ids; losing, repeating or delaying one is harmless."""

from __future__ import annotations

import logging
from pathlib import Path
from queue import Empty
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES, filesystem

RUN_JOB = "unpoison.run_job"
logger = logging.getLogger(__name__)


class _Channel(filesystem.Channel):
    """A folder that somebody removed is an empty queue until the sweeper makes it again; kombu would end the worker."""

    def _get(self, queue: Any, timeout: Any = None) -> Any:
        try:
            return super()._get(queue)
        except FileNotFoundError:
            raise Empty from None


class FolderTransport(filesystem.Transport):
    """kombu's folder queue with that channel."""

    Channel = _Channel


def app(url: str) -> Celery:
    """Return the Celery application on `redis://…` or `filesystem://FOLDER`."""
    celery = Celery("unpoison")
    options: dict[str, Any] = {"visibility_timeout": 86_400}
    broker = url
    if url.startswith("filesystem://"):
        folder = Path(url.removeprefix("filesystem://"))
        make_folder(url)
        TRANSPORT_ALIASES["filesystem"] = "store.queue:FolderTransport"
        broker = "filesystem://"
        # kombu misses a host name that a folder does not have.
        logging.getLogger("kombu.connection").setLevel(logging.ERROR)
        options = {"data_folder_in": str(folder), "data_folder_out": str(folder), "control_folder": str(folder / "control"), "polling_interval": 0.2}
    else:
        options |= {"socket_timeout": 10, "socket_connect_timeout": 3, "socket_keepalive": True}
    celery.conf.update(
        broker_url=broker,
        broker_transport_options=options,
        visibility_timeout=86_400,
        # The row is the job: a message is done when it is read, and what a crash loses the sweeper finds.
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue="gpu",
        task_track_started=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
    )
    return celery


def make_folder(url: str) -> None:
    """Make a filesystem queue's folders, again if somebody removed them."""
    if url.startswith("filesystem://"):
        (Path(url.removeprefix("filesystem://")) / "control").mkdir(parents=True, exist_ok=True)


def announce(celery: Celery, job_id: str) -> bool:
    """Ring for a job; return whether the queue took it. A dead queue is no error: the sweeper rings again."""
    try:
        celery.send_task(RUN_JOB, args=[job_id], retry=False)
    except (OperationalError, OSError) as error:
        logger.warning("the queue is down, job %s waits for the sweeper: %s", job_id, error)
        return False
    return True

"""The queue is a doorbell: it carries job ids; losing, repeating or delaying one is harmless."""

from __future__ import annotations

import json
import logging
import time
import uuid
from pathlib import Path
from queue import Empty
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES, filesystem

RUN_JOB = "unpoison.run_job"
logger = logging.getLogger(__name__)


class _Channel(filesystem.Channel):
    """kombu's folder queue, where a process killed, or overtaken, half way through a file breaks no other's.

    kombu's writes a message in place, so that a reader can find half of it, which ends the worker; and of the bindings,
    which a killed process can leave empty for ever, there is nothing to know: Celery addresses its one queue by name.
    """

    # kombu's two base classes name the message differently.
    def _put(self, queue: str, payload: dict[str, Any], **kwargs: Any) -> None:  # type: ignore[override]
        whole = Path(self.data_folder_out, f"{time.time_ns()}_{uuid.uuid4()}.{queue}.msg")
        half = whole.with_suffix(".half")
        half.write_text(json.dumps(payload))
        half.replace(whole)

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        for file in sorted(Path(self.data_folder_in).glob(f"*.{queue}.msg")):
            try:
                content = file.read_bytes()
                file.unlink()
            except FileNotFoundError:  # another worker's, or somebody removed the folder until the sweeper makes it again
                continue
            try:
                message: dict[str, Any] = json.loads(content)
                return message
            except ValueError:
                logger.warning("%s is no message; the sweeper rings for its job again", file.name)
        raise Empty

    def _queue_bind(self, *_binding: Any) -> None:
        """Nothing to do: a message for the queue's name needs no table of exchanges."""


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
        options = {"data_folder_in": str(folder), "data_folder_out": str(folder), "polling_interval": 0.2}
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
    """Make a filesystem queue's folder, again if somebody removed it."""
    if url.startswith("filesystem://"):
        Path(url.removeprefix("filesystem://")).mkdir(parents=True, exist_ok=True)


def announce(celery: Celery, job_id: str) -> bool:
    """Ring for a job; return whether the queue took it. A dead queue is no error: the sweeper rings again."""
    try:
        celery.send_task(RUN_JOB, args=[job_id], retry=False)
    except (OperationalError, OSError) as error:
        logger.warning("the queue is down, job %s waits for the sweeper: %s", job_id, error)
        return False
    return True

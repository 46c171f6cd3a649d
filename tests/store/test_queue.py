"""The folder queue of a laptop, where processes are killed and overtaken at any moment."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
from celery import Celery

from store import queue


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "queue"


@pytest.fixture
def app(folder: Path) -> Celery:
    return queue.app(f"filesystem://{folder}")


def heard(app: Celery) -> list[str]:
    """Take every message that lies there; return the job ids."""
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        found = []
        while message := channel.basic_get("gpu", no_ack=True):
            found.append(message.decode()[0][0])
        return found


def test_a_message_is_taken_once_and_never_half_written(app: Celery) -> None:
    # Long enough to be read while it is written.
    sent = [f"{number}:" + "x" * 1_000_000 for number in range(30)]
    taken: Counter[str] = Counter()
    written = threading.Event()

    def listen() -> None:
        last = False
        while not last:
            last = written.is_set()
            taken.update(heard(app))

    readers = [threading.Thread(target=listen) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert all(queue.announce(app, job_id) for job_id in sent)
    written.set()
    for reader in readers:
        reader.join()
    assert taken == Counter(sent)


@pytest.mark.parametrize("content", [b"", b'{"body": "W1si', b"\xff\xfe"], ids=["empty", "cut off", "no text"])
def test_a_file_that_is_no_message_is_passed_over(app: Celery, folder: Path, content: bytes) -> None:
    (folder / "0_0.gpu.msg").write_bytes(content)
    assert queue.announce(app, "job_1")
    assert heard(app) == ["job_1"]
    assert not list(folder.glob("*.msg"))


def test_a_removed_folder_is_an_empty_queue_until_it_is_made_again(app: Celery, folder: Path) -> None:
    folder.rmdir()
    assert heard(app) == []
    assert not queue.announce(app, "job_1")
    queue.make_folder(f"filesystem://{folder}")
    assert queue.announce(app, "job_2")
    assert heard(app) == ["job_2"]

"""Real services for tests: databases, queues, object stores, the API and workers as processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

import service.__main__
from client import Client
from store import keys
from store.database import Database
from store.objects import Objects

ROOT = Path(__file__).resolve().parent.parent
FAST = {
    "UNPOISON_LEASE_SECONDS": "3",
    "UNPOISON_BEAT_SECONDS": "0.5",
    "UNPOISON_SWEEP_SECONDS": "0.5",
    "UNPOISON_CHECKPOINT_SECONDS": "0",
}
# Importing the API and what it loads in the background takes seconds of CPU: one process does it, and every API is a fork of that one.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["service.app", "torchvision", "tests.stack"])

Process = subprocess.Popen[bytes] | psutil.Process


@dataclass
class Stack:
    """One configuration of the floors, with the processes started on it."""

    folder: Path
    environment: dict[str, str]
    port: int = 0
    processes: list[Process] = field(default_factory=list)
    key: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def database(self) -> Database:
        if not hasattr(self, "_database"):
            self._database = Database(self.environment["UNPOISON_DATABASE_URL"])
        return self._database

    @property
    def objects(self) -> Objects:
        return Objects(self.environment["UNPOISON_OBJECTS_URL"])

    def start_api(self, *, file_bytes: int | None = None) -> psutil.Process:
        self.port = self.port or free_port()
        environment = {**os.environ, **self.environment, "UNPOISON_PORT": str(self.port)}
        # A daemon, so that none outlives the tests.
        fork = FORKS.Process(target=serve, args=(environment, self._log("service"), file_bytes), daemon=True)
        fork.start()
        process = psutil.Process(fork.pid)
        self.processes.append(process)
        # Starting takes seconds, but half a minute on a slow machine, and several may start at once.
        until = time.monotonic() + 180
        while time.monotonic() < until:
            assert process.is_running(), self.logs()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/livez", timeout=1).close()
                return process
            time.sleep(0.1)
        raise AssertionError(self.logs())

    def start_worker(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self.environment}
        with self._log("worker").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "worker"], env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        return process

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}-{len(self.processes)}.log"

    def client(self, *, tenant: str | None = None, scopes: tuple[str, ...] = keys.SCOPES, **more: Any) -> Client:
        """Return a client with a key of its own (and, unless named, a tenant of its own)."""
        return Client(self.url, self.make_key(tenant=tenant, scopes=scopes), **more)

    def make_key(self, *, tenant: str | None = None, scopes: tuple[str, ...] = keys.SCOPES, expires_at: float | None = None) -> str:
        self.database.migrate()
        with self.database.write() as session:
            return keys.create(session, tenant=tenant, name="test", scopes=list(scopes), expires_at=expires_at)[1]

    def engines(self) -> list[psutil.Process]:
        """Engine processes that work for this stack."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "worker.engine" in command and any(str(self.folder) in part for part in command):
                found.append(process)
        return found

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        for process in self.processes:
            kill(process)
        if hasattr(self, "_database"):
            self._database.engine.dispose()


def serve(environment: dict[str, str], log: Path, file_bytes: int | None) -> None:
    """Become `python -m service api`."""
    os.setsid()
    os.chdir(ROOT)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.exit(service.__main__.main(["api"]))


def kill(process: Process, number: int = signal.SIGKILL) -> None:
    """Signal a process and, for SIGKILL, wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
    if number == signal.SIGKILL:
        process.wait(20)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def fresh_postgres(server_url: str) -> Iterator[str]:
    """Yield the URL of an empty database on a running Postgres."""
    name = f"t{uuid.uuid4().hex[:12]}"
    url = sa.make_url(server_url).set(drivername="postgresql+psycopg")
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    yield url.set(database=name).render_as_string(hide_password=False)
    # At the end of a session the server may be gone before its last databases.
    with contextlib.suppress(sa.exc.OperationalError), admin.connect() as connection:
        connection.execute(sa.text(f"drop database {name} with (force)"))
    admin.dispose()

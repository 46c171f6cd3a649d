"""What happens to an upload after it arrived: intake reads it in its fence, once, whoever restarts meanwhile."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from core.architectures import recognise
from core.errors import EngineError
from core.weights import contradictions
from intake import door
from store import library
from store.database import Database
from store.errors import NotFound, StoreError, StoreFull
from store.objects import Objects
from store.settings import Settings
from store.tables import Dataset, Model

logger = logging.getLogger(__name__)
ADVICE = "Upload the state dict of an unmodified model of a known architecture."


class Reader:
    """Reads uploads in child processes, two at a time."""

    def __init__(self, settings: Settings, database: Database, objects: Objects) -> None:
        self._settings, self._database, self._objects = settings, database, objects
        self._slots = asyncio.Semaphore(2)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def patience(self) -> float:
        """How long a reader may own an upload, seconds."""
        return self._settings.intake_seconds + 60

    async def read(self, table: type[Model] | type[Dataset], row_id: str, sha256: str, resize: int | None = None) -> None:
        """Start reading; return when it is done or the setting's wait is over, whichever is first."""
        task = asyncio.create_task(self._read_at_last(table, row_id, sha256, resize))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait({task}, timeout=self._settings.intake_wait_seconds)

    async def preview(self, table: type[Model] | type[Dataset], file: Path, resize: int | None = None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Read a file that is kept nowhere; return what was understood, or the refusal, as the stored upload would have them."""

        def act() -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
            out = file.with_name(f"{uuid.uuid4().hex}.preview")
            out.mkdir()
            try:
                return self._understand(table, file, out, resize)
            finally:
                shutil.rmtree(out, ignore_errors=True)

        async with self._slots:
            return await asyncio.to_thread(act)

    async def take_over(self) -> None:
        """Read what another process left unread, for ever."""
        while True:
            try:
                for table in (Model, Dataset):
                    for row in await asyncio.to_thread(self._abandoned, table):
                        await self._read(table, row.id, row.sha256, getattr(row, "resize", None))
                # Longer than the longest reading of an upload, which keeps a folder there.
                await asyncio.to_thread(self._objects.forget_incoming, self._settings.scratch, older_than_seconds=self.patience + 3600)
            except (StoreError, OSError) as error:
                logger.warning("cannot look for unread uploads: %s", error)
            await asyncio.sleep(self._settings.sweep_seconds)

    def _abandoned(self, table: Any) -> list[Any]:
        with self._database.write() as session:
            found: list[Any] = library.abandoned(session, table, reading_seconds=self.patience)
        return found

    async def _read_at_last(self, table: type[Model] | type[Dataset], row_id: str, sha256: str, resize: int | None) -> None:
        """Try again while a full disk or a store that is away keeps the upload from being read, as long as it is this process's to read."""
        until, pause = time.monotonic() + self.patience, self._settings.sweep_seconds
        while not await self._read(table, row_id, sha256, resize) and time.monotonic() + pause < until:
            await asyncio.sleep(pause)
            pause = min(2 * pause, 300.0)

    async def _read(self, table: type[Model] | type[Dataset], row_id: str, sha256: str, resize: int | None) -> bool:
        """Return whether there is nothing more to do."""
        try:
            async with self._slots:
                await asyncio.to_thread(self._examine, table, row_id, sha256, resize)
        except NotFound:
            # It was deleted meanwhile.
            return True
        except (StoreError, OSError) as error:
            # The row stays `received`; if this process gives up, whoever looks for abandoned uploads takes it up again.
            logger.warning("cannot read upload %s now: %s", row_id, error)
            return False
        return True

    def _examine(self, table: type[Model] | type[Dataset], row_id: str, sha256: str, resize: int | None) -> None:
        folder = self._objects.incoming(self._settings.scratch) / uuid.uuid4().hex
        out = folder / "out"
        out.mkdir(parents=True)
        try:
            file = self._objects.local(sha256)
            if file is None:
                file = folder / "file"
                self._objects.fetch(sha256, file)
            description, refusal = self._understand(table, file, out, resize)
            if refusal is not None:
                self._settle(table, row_id, refusal=refusal)
                return
            safe = self._keep(out / f"{table.__tablename__}.safetensors")
            details = self._keep(out / "dataset.json") if table is Dataset else None
            self._settle(table, row_id, description=description, safe_sha256=safe, details_sha256=details)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _understand(self, table: type[Model] | type[Dataset], file: Path, out: Path, resize: int | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Have the fenced reader write a file's safe form into `out`; return its description, or why it was refused."""
        verdict = door.examine(table.__tablename__, file, out, resize=resize, timeout_seconds=self._settings.intake_seconds)
        if verdict.code == "storage_full":
            raise StoreFull(verdict.message)
        if not verdict.ready:
            return None, {"code": verdict.code, "message": verdict.message, "advice": verdict.advice}
        description = {**verdict.description, "fence": list(verdict.fence)}
        if table is Model:
            try:
                description |= recognised(description)
            except EngineError as error:
                return None, error.as_dict()
        return description, None

    def _keep(self, path: Path) -> str:
        sha256, size = self._objects.take(path, self._settings.scratch)
        with self._database.write() as session:
            library.touch(session, sha256, size)
        return sha256

    def _settle(self, table: type[Model] | type[Dataset], row_id: str, **outcome: Any) -> None:
        with self._database.write() as session:
            library.settle(session, table, row_id, **outcome)  # type: ignore[type-var]


def recognised(description: dict[str, Any]) -> dict[str, Any]:
    """Return what the tensors' names and shapes say: architecture candidates, classes, input.

    Raises `ArchitectureUnknown`, `ArchitectureMismatch`.
    """
    shapes = {name: tuple(tensor["shape"]) for name, tensor in description["tensors"].items()}
    variants = recognise(shapes)
    contradictions(shapes, variants[0])
    # Several fit where parameters cannot tell them apart; the engine decides when it sees images.
    return {**variants[0].describe(), "architecture": variants[0].name if len(variants) == 1 else None, "candidates": [variant.name for variant in variants]}

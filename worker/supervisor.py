"""One job on this machine: claim, fetch, run the engine, follow it, store what comes out."""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from intake import door
from store import ids, jobs, library
from store.database import Database
from store.errors import LostLease, NotFound, StoreUnavailable
from store.objects import Objects
from store.settings import Settings
from store.tables import Artifact, Dataset, Job, Model
from worker.child import Child
from worker.lease import Lease

logger = structlog.get_logger()
TICK_SECONDS = 0.1
EXIT_FAILED = 3


class Stopped(Exception):
    """The engine was stopped by us; the reason says what becomes of the job."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def run(
    settings: Settings,
    database: Database,
    objects: Objects,
    job_id: str,
    *,
    owner: str,
    draining: Callable[[], bool] = lambda: False,
) -> str | None:
    """Run a job if it is there to be taken; return what became of it here, or None if it was not ours to run."""
    with database.write() as session:
        job = jobs.claim(session, job_id, owner=owner, lease_seconds=settings.lease_seconds)
    if job is None:
        return None
    with structlog.contextvars.bound_contextvars(job_id=job_id, attempt=job.attempt):
        attempt = _Attempt(settings, database, objects, job, draining)
        try:
            with attempt.lease:
                outcome = attempt.run()
        except LostLease:
            outcome = "lost"
        finally:
            attempt.clear()
        logger.info("attempt ended", outcome=outcome)
        return outcome


class _Attempt:
    """One attempt at a job; its number is the fence of every write."""

    def __init__(self, settings: Settings, database: Database, objects: Objects, job: Job, draining: Callable[[], bool]) -> None:
        self._settings, self._database, self._objects, self._job = settings, database, objects, job
        self._draining = draining
        self._folder = settings.scratch / "jobs" / f"{job.id}-{job.attempt}-{os.getpid()}"
        self._engine: Child | None = None
        self._waiting: list[dict[str, Any]] = []
        self._artifacts: dict[str, dict[str, Any]] = {}
        self._metrics: dict[str, float] = {}
        self._results: dict[str, Any] | None = None
        self._cleansed: Path | None = None
        self._error: dict[str, Any] | None = None
        self._phase = job.phase
        self._flushed_at = time.monotonic()
        # The limit is the job's, not the attempt's; the claim has just written both times by the database's clock.
        spent = (job.lease_until or 0.0) - settings.lease_seconds - (job.started_at or 0.0)
        self._deadline = time.monotonic() + job.max_seconds - spent
        self._patience = max(10 * settings.lease_seconds, 60)
        self.lease = Lease(settings, database, job, until=self._deadline + 2 * self._patience)

    def run(self) -> str:
        """Do it; return what became of the job."""
        try:
            self._fetch()
            self._engine = engine = Child(self._settings, self._folder)
            code = self._follow(engine)
            if code == 0 and self._job.kind == "cleanse":
                self._rewrite()
        except Stopped as stop:
            self._kill()
            if stop.reason != "draining":
                # Whoever reads that the job has ended finds nothing of it left here; no attempt will want its checkpoints.
                self._waiting = [event for event in self._waiting if event["type"] != "checkpoint"]
                self.clear()
            return self._stopped(stop.reason)
        except (NotFound, StoreUnavailable) as error:
            self._kill()
            reason = error.detail
            return self._insist(lambda: self._crashed(reason, "Retry it when the database and the object store answer again."))
        except OSError as error:
            self._kill()
            reason = f"the worker's disk or processes failed: {error}"
            return self._insist(lambda: self._crashed(reason, "Check the worker's disk, and retry."))
        if self._error is not None and code == EXIT_FAILED:
            why = {"code": self._error["code"], "detail": self._error["message"], "advice": self._error["advice"], "phase": self._phase, "retryable": False}
            return self._insist(lambda: self._fail(why))
        if code == 0 and self._results is not None:
            return self._insist(self._succeed)
        tail = engine.last_words()
        reason = f"the engine ended with code {code}{': ' + tail if tail else ''}"
        # A signal ends what takes too much memory; what ends by itself without saying why has met a fault of ours.
        return self._insist(lambda: self._crashed(reason, jobs.MORE_MEMORY if code < 0 else "Report this message; a retry is unlikely to end otherwise."))

    def clear(self) -> None:
        """Stop what runs and remove the scratch folder."""
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- before ---------------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        """Lay the inputs and the newest checkpoints into the scratch folder, verified."""
        inputs = self._folder / "inputs"
        inputs.mkdir(parents=True, mode=0o700)
        (self._folder / "checkpoints").mkdir()
        with self._database.read() as session:
            model = library.get(session, Model, self._job.model_id, self._job.tenant) if self._job.model_id else None
            roles = {
                "clean": self._job.dataset_id, "test": self._job.test_dataset_id, "triggered": self._job.triggered_dataset_id,
                "suspect": self._job.suspect_dataset_id,
            }  # fmt: skip
            data = {role: library.get(session, Dataset, found, self._job.tenant) for role, found in roles.items() if found}
            kept = jobs.checkpoints(session, self._job.id)
        if model is not None:
            self._objects.fetch(model.safe_sha256 or "", inputs / "model.safetensors")
        for role, row in data.items():
            (inputs / role).mkdir()
            self._objects.fetch(row.safe_sha256 or "", inputs / role / "dataset.safetensors")
            self._objects.fetch(row.details_sha256 or "", inputs / role / "dataset.json")
            self._check()
        for checkpoint in kept:
            self._objects.fetch(checkpoint.sha256, self._folder / "checkpoints" / checkpoint.name)
        request = self._job.request
        evaluation = request.get("evaluation")
        spec = {
            "defense": request["defense"],
            "model": "inputs/model.safetensors" if model is not None else None,
            "clean": "inputs/clean" if self._job.dataset_id else None,
            "suspect": "inputs/suspect" if self._job.suspect_dataset_id else None,
            "evaluation": _evaluation(evaluation) if evaluation else None,
            "architecture": request.get("architecture"),
            "preprocessing": request.get("preprocessing"),
            "seed": self._job.seed,
            "checkpoint_seconds": self._settings.checkpoint_seconds,
        }
        (self._folder / "job.json").write_text(json.dumps(spec))

    # -- while it runs --------------------------------------------------------------------------------------------

    def _follow(self, engine: Child) -> int:
        """Handle the engine's events until it ends; return its exit code.

        Raises `Stopped`, `LostLease`.
        """
        ended = False
        while not ended:
            try:
                line = engine.lines.get(timeout=TICK_SECONDS)
                while line is not None:
                    self._hear(line)
                    line = engine.lines.get_nowait()
                ended = True
            except queue.Empty:
                pass
            self._check()
            if self._waiting and (ended or time.monotonic() - self._flushed_at >= 0.5):
                self._flush()
        return engine.wait()

    def _check(self) -> None:
        """Stop for a cancel, the job's time limit, a shutdown, or because the job is another's.

        Raises `Stopped`, `LostLease`.
        """
        if self.lease.lost:
            raise LostLease(f"attempt {self._job.attempt} no longer owns job {self._job.id}")
        if self._draining():
            raise Stopped("draining")
        if time.monotonic() > self._deadline:
            raise Stopped("timeout")
        if self.lease.cancelled:
            raise Stopped("cancel")

    def _hear(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind, data = event["type"], event["data"]
        except (ValueError, KeyError, TypeError):
            self._waiting.append({"type": "log", "message": line.decode(errors="replace").strip()[:2000], "data": {}})
            return
        if kind == "result":
            self._results = data
            return
        if kind == "error":
            self._error = data
            return
        if kind == "artifact":
            self._artifacts[data["name"]] = data
        if kind == "metric" and data["name"] in ("ba", "asr"):
            self._metrics[data["name"]] = data["value"]
        self._waiting.append(event)

    def _flush(self) -> None:
        """Write what the engine said; checkpoints go to the object store first."""
        events, self._waiting = self._waiting, []
        self._flushed_at = time.monotonic()
        phase = next((event["data"]["phase"] for event in reversed(events) if event["type"] == "phase"), None)
        if phase is not None:
            self._phase = phase
        progress = next((event["data"] for event in reversed(events) if event["type"] == "progress"), None)
        if progress is not None:
            total = progress["total"] or 1
            progress = {**progress, "fraction": progress["step"] / total, "metrics": dict(self._metrics)}
        names = {event["data"]["name"] for event in events if event["type"] == "checkpoint"}
        shown = [event for event in events if event["type"] != "checkpoint"]
        try:
            saved = [(name, self._keep(self._folder / "checkpoints" / name)[0]) for name in sorted(names)]
            with self._database.write() as session:
                jobs.record(session, self._job.id, self._job.attempt, shown, phase=phase, progress=progress, checkpoints=saved)
        except StoreUnavailable as error:
            logger.warning("cannot store events, will try again", error=error.detail)
            self._waiting = events + self._waiting

    def _keep(self, path: Path) -> tuple[str, int]:
        sha256, size = self._objects.put(path, self._settings.scratch)
        with self._database.write() as session:
            library.touch(session, sha256, size)
        return sha256, size

    # -- after ----------------------------------------------------------------------------------------------------

    def _rewrite(self) -> None:
        """Have the fenced reader write the uploaded data set again as the engine's manifest says.

        Raises `Stopped`, `LostLease`, and `OSError` when the reader fails: the upload was read before, so it is the machine's fault.
        """
        folder, inputs = self._folder / "rewritten", self._folder / "inputs"
        folder.mkdir(exist_ok=True)
        with self._database.read() as session:
            suspect = library.get(session, Dataset, self._job.suspect_dataset_id or "", self._job.tenant)
        self._objects.fetch(suspect.sha256, inputs / "upload")
        shutil.copy(inputs / "suspect" / "dataset.json", folder)
        shutil.copy(self._folder / "out" / "manifest.jsonl", folder)
        found: list[door.Verdict] = []
        patience = self._settings.intake_seconds
        thread = threading.Thread(target=lambda: found.append(door.examine("rewrite", inputs / "upload", folder, timeout_seconds=patience)), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(TICK_SECONDS)
            self._check()
        if not found or not found[0].ready:
            raise OSError(f"the cleansed data set cannot be written: {found[0].message if found else 'the reader did not start'}")
        shutil.copy(folder / "manifest.jsonl", self._folder / "out" / "manifest.jsonl")
        self._cleansed = folder / Path(found[0].description["file"]).name

    def _succeed(self) -> str:
        """Store the files, then point the row to them in one transaction: that is the moment of success."""
        report = self._results or {}
        rows = []
        with self._database.read() as session:
            moment = jobs.moment(session)
        for name, said in self._artifacts.items():
            sha256, size = self._keep(self._folder / "out" / Path(name).name)
            rows.append(
                Artifact(
                    id=ids.new("art"),
                    job_id=self._job.id,
                    tenant=self._job.tenant,
                    kind=said["kind"],
                    filename=name,
                    media_type=said["media_type"],
                    bytes=size,
                    sha256=sha256,
                    created_at=moment,
                )
            )
        cleaned = next((row for row in rows if row.kind == "cleaned_model"), None)
        model = self._model(report["model"], cleaned, moment) if cleaned is not None else None
        dataset = self._dataset(self._cleansed, moment) if self._cleansed is not None else None
        results = {
            name: report.get(name)
            for name in (
                "before", "after", "der", "estimated", "findings", "recognised", "measured_on", "kept_aside", "verdict", "classes_lost", "cleansing", "seconds",
            )
        }  # fmt: skip
        verdict = report.get("verdict") or {}
        with self._database.write() as session:
            if verdict.get("verdict") == "not_purified":
                # Its files are kept as evidence, and no model comes of it.
                error = {
                    "code": "not_purified", "detail": "; ".join(verdict["reasons"]), "advice": verdict["advice"], "phase": self._phase, "retryable": False,
                }  # fmt: skip
                jobs.fail(session, self._job.id, self._job.attempt, error, results=results, artifacts=rows)
                return "failed"
            jobs.succeed(session, self._job.id, self._job.attempt, results=results, artifacts=rows, model=model, dataset=dataset)
        return "succeeded"

    def _model(self, said: dict[str, Any], cleaned: Artifact, moment: float) -> Model:
        """Return the row that makes the purified or trained weights a model of their own."""
        with (self._folder / "out" / cleaned.filename).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        tensors = {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in header.items()}
        return Model(
            id=ids.new(library.PREFIX[Model]), tenant=self._job.tenant, name=self._named(), filename=cleaned.filename,
            status=library.READY, bytes=cleaned.bytes, sha256=cleaned.sha256, safe_sha256=cleaned.sha256, labels={}, created_at=moment,
            description={**said["description"], "container": "safetensors", "wrapper": "", "tensors": tensors}, origin_job_id=self._job.id,
        )  # fmt: skip

    def _dataset(self, path: Path, moment: float) -> Dataset:
        """Return the row of the cleansed data set; it is read like any upload before it is ready."""
        sha256, size = self._keep(path)
        with self._database.read() as session:
            suspect = library.get(session, Dataset, self._job.suspect_dataset_id or "", self._job.tenant)
        return Dataset(
            id=ids.new(library.PREFIX[Dataset]), tenant=self._job.tenant, name=self._named(), filename=path.name, status=library.RECEIVED, bytes=size, sha256=sha256,
            labels={}, created_at=moment, reading_until=moment, origin_job_id=self._job.id, resize=suspect.resize,
        )  # fmt: skip

    def _named(self) -> str:
        """Return what to call what the job made: after what it was made of."""
        job = self._job
        with self._database.read() as session:
            if job.kind == "purify":
                name = library.get(session, Model, job.model_id or "", job.tenant).name
            else:
                name = library.get(session, Dataset, job.suspect_dataset_id or "", job.tenant).name
        return f"{name} after {job.method}"[:200]

    def _fail(self, error: dict[str, Any]) -> str:
        with self._database.write() as session:
            jobs.fail(session, self._job.id, self._job.attempt, error)
        return "failed"

    def _crashed(self, reason: str, advice: str) -> str:
        with self._database.write() as session:
            return jobs.crashed(session, self._job.id, self._job.attempt, reason=reason, advice=advice, max_crashes=self._settings.max_crashes)

    def _stopped(self, reason: str) -> str:
        def act() -> str:
            with self._database.write() as session:
                if reason == "cancel":
                    jobs.cancelled(session, self._job.id, self._job.attempt)
                    return "cancelled"
                jobs.release(session, self._job.id, self._job.attempt)
                return "released"

        if reason == "timeout":
            error = {
                "code": "timeout", "detail": f"the job ran longer than {self._job.max_seconds:g} s", "phase": self._phase, "retryable": False,
                "advice": "Give a larger max_seconds, or fewer epochs.",
            }  # fmt: skip
            return self._insist(lambda: self._fail(error))
        return self._insist(act)

    def _insist(self, act: Callable[[], str]) -> str:
        """Carry out the last write, waiting for a database or store that is away; the fence says if we are too late."""
        pause = 0.5
        until = time.monotonic() + self._patience
        while True:
            try:
                if self._waiting:
                    self._flush()
                return act()
            except (StoreUnavailable, OSError) as error:
                if time.monotonic() > until:
                    raise LostLease("the store was away for too long") from error
                logger.warning("cannot finish yet", error=str(error))
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def _kill(self) -> None:
        if self._engine is not None:
            self._engine.kill()
            self._engine = None


def _evaluation(requested: dict[str, Any]) -> dict[str, Any]:
    """Return the engine's form of a request's `evaluation`."""
    triggered = requested.get("triggered")
    return {
        "test": "inputs/test",
        "attack": requested["attack"],
        "triggered": "inputs/triggered" if triggered else None,
        "target": triggered["target"] if triggered else None,
    }

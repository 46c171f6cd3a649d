"""The life of a job: every change is one fenced UPDATE and its event, in one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from store import ids, states
from store.database import now
from store.errors import LostLease, NotFound, NotTerminal
from store.tables import Artifact, Checkpoint, Dataset, Event, Job, Model

# What helps a job whose process was ended from outside, most often.
MORE_MEMORY = "Retry it on a machine with more memory, or with a smaller batch_size."

NewEvent = dict[str, Any]


def create(
    session: Session,
    *,
    tenant: str,
    kind: str,
    method: str,
    model_id: str | None,
    dataset_id: str | None,
    test_dataset_id: str | None,
    request: dict[str, Any],
    seed: int,
    max_seconds: float,
    labels: dict[str, str],
    triggered_dataset_id: str | None = None,
    suspect_dataset_id: str | None = None,
    retry_of: str | None = None,
) -> Job:
    """Insert a queued job and its first event."""
    at = moment(session)
    job = Job(
        id=ids.new("job"), tenant=tenant, status=states.QUEUED, kind=kind, method=method, model_id=model_id, dataset_id=dataset_id,
        test_dataset_id=test_dataset_id, triggered_dataset_id=triggered_dataset_id, suspect_dataset_id=suspect_dataset_id, request=request, seed=seed, max_seconds=max_seconds,
        labels=labels, retry_of=retry_of, attempt=0, crashes=0, last_seq=0, created_at=at, queued_at=at,
    )  # fmt: skip
    session.add(job)
    session.flush()
    _append(session, job.id, [_state_event(states.QUEUED)])
    session.refresh(job)
    return job


def get(session: Session, job_id: str, tenant: str) -> Job:
    """Return a tenant's job.

    Raises `NotFound`, the same for another tenant's.
    """
    job = session.scalar(sa.select(Job).where(Job.id == job_id, Job.tenant == tenant))
    if job is None:
        raise NotFound(f"there is no job {job_id}")
    return job


# -- the worker's side ---------------------------------------------------------------------------------------------


def claim(session: Session, job_id: str, *, owner: str, lease_seconds: float) -> Job | None:
    """Take a queued job; None when somebody else has it, or nobody needs to.

    The returned job's `attempt` is the fence that every later write must show.
    """
    taken = session.execute(
        sa.update(Job)
        .where(Job.id == job_id, Job.status == states.QUEUED)
        .values(
            status=states.RUNNING,
            attempt=Job.attempt + 1,
            lease_owner=owner,
            lease_until=now() + lease_seconds,
            started_at=sa.func.coalesce(Job.started_at, now()),
            phase="fetching",
            error=None,
        )
        .execution_options(synchronize_session=False)
    )
    if not taken.rowcount:  # type: ignore[attr-defined]
        return None
    _append(session, job_id, [_state_event(states.RUNNING, owner=owner)])
    return session.get_one(Job, job_id)


def beat(session: Session, job_id: str, fence: int, *, lease_seconds: float) -> bool:
    """Renew the lease; return whether the job was asked to stop.

    Raises `LostLease` when another attempt owns the job.
    """
    _fenced(session, job_id, fence, lease_until=now() + lease_seconds)
    return session.scalar(sa.select(Job.cancel_requested_at).where(Job.id == job_id)) is not None


def cancel_requested(session: Session, job_id: str, fence: int) -> bool:
    """Say whether the job was asked to stop.

    Raises `LostLease` when another attempt owns the job.
    """
    row = session.execute(sa.select(Job.attempt, Job.status, Job.cancel_requested_at).where(Job.id == job_id)).first()
    if row is None or row.attempt != fence or row.status not in states.ACTIVE:
        raise LostLease(f"attempt {fence} no longer owns job {job_id}")
    return row.cancel_requested_at is not None


def record(
    session: Session,
    job_id: str,
    fence: int,
    events: Sequence[NewEvent],
    *,
    phase: str | None = None,
    progress: dict[str, Any] | None = None,
    checkpoints: Iterable[tuple[str, str]] = (),
) -> None:
    """Append events and what they say of the job; `checkpoints` are (name, sha256).

    Raises `LostLease`.
    """
    values: dict[str, Any] = {}
    if phase is not None:
        values["phase"] = phase
    if progress is not None:
        values["progress"] = progress
    for name, sha256 in checkpoints:
        values["crashes"] = 0  # the attempt got further than the last one
        session.execute(sa.delete(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.name == name))
        session.add(Checkpoint(job_id=job_id, name=name, sha256=sha256, created_at=moment(session)))
    _fenced(session, job_id, fence, **values)
    _append(session, job_id, events)


def succeed(
    session: Session,
    job_id: str,
    fence: int,
    *,
    results: dict[str, Any],
    artifacts: Sequence[Artifact],
    model: Model | None = None,
    dataset: Dataset | None = None,
) -> None:
    """Finish a job with its artifacts and the model or data set it made.

    Raises `LostLease`: the loser's files stay unreferenced.
    """
    _finish(
        session,
        job_id,
        fence,
        states.SUCCEEDED,
        results=results,
        cleaned_model_id=model.id if model else None,
        cleansed_dataset_id=dataset.id if dataset else None,
    )
    session.add_all([*artifacts, *(made for made in (model, dataset) if made is not None)])


def fail(
    session: Session, job_id: str, fence: int, error: dict[str, Any], *, results: dict[str, Any] | None = None, artifacts: Sequence[Artifact] = ()
) -> None:
    """Finish a job that the engine says cannot be done, or whose result must not be used; that one's numbers and files are kept as evidence.

    Raises `LostLease`.
    """
    _finish(session, job_id, fence, states.FAILED, error=error, **({"results": results} if results else {}))
    session.add_all(artifacts)


def cancelled(session: Session, job_id: str, fence: int) -> None:
    """Finish a job whose processes have stopped after a request to cancel.

    Raises `LostLease`.
    """
    _finish(session, job_id, fence, states.CANCELLED)


def release(session: Session, job_id: str, fence: int) -> None:
    """Give a job back to the queue because this worker is leaving; no crash is counted.

    Raises `LostLease`.
    """
    _to_queue(session, job_id, fence, crashes=Job.crashes, reason="the worker was stopped")


def crashed(session: Session, job_id: str, fence: int, *, reason: str, max_crashes: int, advice: str = MORE_MEMORY, only_expired: bool = False) -> str:
    """Note that a process of this attempt died; return the job's new status (queued, crashed or cancelled).

    Args:
        reason: what was seen of it. advice: what to do if it is the last attempt.
        only_expired: do it only if the lease has run out, for somebody who saw that a moment ago.

    Raises `LostLease`.
    """
    _fenced(session, job_id, fence, condition=Job.lease_until < now() if only_expired else None)
    job = session.get_one(Job, job_id, populate_existing=True)
    if job.cancel_requested_at is not None:
        _finish(session, job_id, fence, states.CANCELLED)
        return states.CANCELLED
    if job.crashes + 1 >= max_crashes:
        error = {
            "code": "worker_lost",
            "detail": f"the job's process died {job.crashes + 1} times in a row without getting further: {reason}",
            "advice": advice,
            "phase": job.phase,
            "retryable": True,
        }
        _finish(session, job_id, fence, states.CRASHED, error=error)
        return states.CRASHED
    _to_queue(session, job_id, fence, crashes=Job.crashes + 1, reason=reason)
    return states.QUEUED


def checkpoints(session: Session, job_id: str) -> list[Checkpoint]:
    """Return the newest checkpoint of each stage."""
    return list(session.scalars(sa.select(Checkpoint).where(Checkpoint.job_id == job_id)))


# -- the sweeper's side --------------------------------------------------------------------------------------------


def expired(session: Session) -> list[tuple[str, int]]:
    """Return (id, fence) of the jobs whose worker has not been heard of within its lease."""
    found = session.execute(sa.select(Job.id, Job.attempt).where(Job.status.in_(states.ACTIVE), Job.lease_until < now()))
    return [(job_id, attempt) for job_id, attempt in found]


def unannounced(session: Session, *, older_than_seconds: float, limit: int = 1000) -> list[str]:
    """Return queued jobs whose announcement is missing or old, oldest first, and mark them announced."""
    query = sa.select(Job.id).where(
        Job.status == states.QUEUED,
        sa.or_(Job.announced_at.is_(None), Job.announced_at < now() - older_than_seconds),
    )
    found = list(session.scalars(query.order_by(Job.queued_at).limit(limit)))
    announced(session, found)
    return found


def announced(session: Session, job_ids: Sequence[str]) -> None:
    """Remember that the queue was told of these jobs."""
    if job_ids:
        session.execute(sa.update(Job).where(Job.id.in_(job_ids)).values(announced_at=now()).execution_options(synchronize_session=False))


# -- the user's side -----------------------------------------------------------------------------------------------


def request_cancel(session: Session, job_id: str, tenant: str) -> Job:
    """Ask a job to stop: a queued one ends at once, a running one becomes `cancelling`, a finished one stays.

    Raises `NotFound`.
    """
    job = get(session, job_id, tenant)
    done = session.execute(
        sa.update(Job)
        .where(Job.id == job_id, Job.status == states.QUEUED)
        .values(status=states.CANCELLED, cancel_requested_at=now(), finished_at=now())
        .execution_options(synchronize_session=False)
    )
    if done.rowcount:  # type: ignore[attr-defined]
        _append(session, job_id, [_state_event(states.CANCELLED)])
        _forget_checkpoints(session, job_id)
    else:
        asked = session.execute(
            sa.update(Job)
            .where(Job.id == job_id, Job.status == states.RUNNING)
            .values(status=states.CANCELLING, cancel_requested_at=now())
            .execution_options(synchronize_session=False)
        )
        if asked.rowcount:  # type: ignore[attr-defined]
            _append(session, job_id, [_state_event(states.CANCELLING)])
    session.refresh(job)
    return job


def retry(session: Session, job_id: str, tenant: str) -> Job:
    """Create a new job with the request and seed of a finished one.

    Raises `NotFound`, `NotTerminal`.
    """
    old = get(session, job_id, tenant)
    if old.status not in states.TERMINAL:
        raise NotTerminal(f"job {job_id} is {old.status}; wait for its end or cancel it")
    return create(
        session, tenant=tenant, kind=old.kind, method=old.method, model_id=old.model_id, dataset_id=old.dataset_id,
        test_dataset_id=old.test_dataset_id, triggered_dataset_id=old.triggered_dataset_id,
        suspect_dataset_id=old.suspect_dataset_id, request=old.request, seed=old.seed,
        max_seconds=old.max_seconds, labels=old.labels, retry_of=old.id,
    )  # fmt: skip


def delete(session: Session, job_id: str, tenant: str) -> None:
    """Delete a finished job with its events and artifacts; a model it made stays.

    Raises `NotFound`, `NotTerminal`.
    """
    job = get(session, job_id, tenant)
    if job.status not in states.TERMINAL:
        raise NotTerminal(f"job {job_id} is {job.status}; cancel it first")
    session.delete(job)


def events(session: Session, job_id: str, *, after: int = 0, limit: int = 1000, kind: str | None = None) -> list[Event]:
    """Return a job's events with a larger `seq` than `after`, in order."""
    query = sa.select(Event).where(Event.job_id == job_id, Event.seq > after)
    if kind is not None:
        query = query.where(Event.type == kind)
    return list(session.scalars(query.order_by(Event.seq).limit(limit)))


def artifacts(session: Session, job_id: str) -> list[Artifact]:
    """Return what a job gave back."""
    return list(session.scalars(sa.select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.filename)))


def artifact(session: Session, artifact_id: str, tenant: str) -> Artifact:
    """Return a tenant's artifact.

    Raises `NotFound`.
    """
    found = session.scalar(sa.select(Artifact).where(Artifact.id == artifact_id, Artifact.tenant == tenant))
    if found is None:
        raise NotFound(f"there is no artifact {artifact_id}")
    return found


# -- shared --------------------------------------------------------------------------------------------------------


def _finish(session: Session, job_id: str, fence: int, state: str, **values: Any) -> None:
    # A request to cancel that came too late does not undo finished work.
    late = {states.CANCELLING} if state in (states.SUCCEEDED, states.FAILED, states.CRASHED) else set()
    _fenced(session, job_id, fence, allowed={*states.before(state), *late}, status=state, finished_at=now(), lease_until=None, lease_owner=None, **values)
    _append(session, job_id, [_state_event(state, **({"error": values["error"]} if "error" in values else {}))])
    _forget_checkpoints(session, job_id)


def _to_queue(session: Session, job_id: str, fence: int, *, crashes: Any, reason: str) -> None:
    _fenced(
        session, job_id, fence, allowed={states.RUNNING},
        status=states.QUEUED, queued_at=now(), lease_until=None, lease_owner=None, announced_at=None, crashes=crashes,
    )  # fmt: skip
    _append(session, job_id, [_state_event(states.QUEUED, reason=reason)])


def _fenced(session: Session, job_id: str, fence: int, *, allowed: Iterable[str] = states.ACTIVE, condition: Any = None, **values: Any) -> None:
    done = session.execute(
        sa.update(Job)
        .where(Job.id == job_id, Job.attempt == fence, Job.status.in_(list(allowed)), *([] if condition is None else [condition]))
        .values(**(values or {"attempt": fence}))
        .execution_options(synchronize_session=False)
    )
    if not done.rowcount:  # type: ignore[attr-defined]
        raise LostLease(f"attempt {fence} no longer owns job {job_id}")


def _append(session: Session, job_id: str, events: Sequence[NewEvent]) -> None:
    if not events:
        return
    count = len(events)
    # The update locks the row, so that two writers cannot draw the same numbers.
    last = session.scalar(
        sa.update(Job).where(Job.id == job_id).values(last_seq=Job.last_seq + count).returning(Job.last_seq).execution_options(synchronize_session=False)
    )
    assert last is not None
    at = moment(session)
    for offset, event in enumerate(events):
        row = Event(id=ids.new("evt"), job_id=job_id, seq=last - count + 1 + offset, at=at, type=event["type"], message=event["message"], data=event["data"])
        session.add(row)
    session.flush()


def _forget_checkpoints(session: Session, job_id: str) -> None:
    session.execute(sa.delete(Checkpoint).where(Checkpoint.job_id == job_id))


def _state_event(state: str, **data: Any) -> NewEvent:
    return {"type": "state", "message": state, "data": {"status": state, **data}}


def moment(session: Session) -> float:
    """Return the database's time, seconds since 1970."""
    found: float = session.scalar(sa.select(now()))  # type: ignore[assignment]
    return found

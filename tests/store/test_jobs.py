"""The life of a job, on SQLite and on Postgres."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import sqlalchemy as sa

from store import idempotency, ids, jobs, keys, library, states
from store.database import Database, now
from store.errors import InUse, KeyReused, LostLease, NotFound, NotTerminal
from store.tables import Checkpoint, Dataset, Event, Job, Model, Object, Table


def made(database: Database, count: int = 1, tenant: str = "t1", model_id: str = "mdl_x") -> list[str]:
    with database.write() as session:
        return [
            jobs.create(
                session, tenant=tenant, kind="purify", method="mcldef", model_id=model_id, dataset_id="dset_x", test_dataset_id=None,
                request={"defense": {}, "evaluation": None}, seed=0, max_seconds=60.0, labels={},
            ).id
            for _ in range(count)
        ]  # fmt: skip


def claimed(database: Database, job_id: str, owner: str = "w1", lease: float = 60.0) -> Job | None:
    with database.write() as session:
        return jobs.claim(session, job_id, owner=owner, lease_seconds=lease)


def history(database: Database, job_id: str) -> list[str]:
    with database.read() as session:
        return [event.data["status"] for event in jobs.events(session, job_id) if event.type == "state"]


def status(database: Database, job_id: str) -> str:
    with database.read() as session:
        return session.get_one(Job, job_id).status


def test_each_job_is_claimed_once_whoever_asks(database: Database) -> None:
    made_ids = made(database, 40)
    taken: Counter[str] = Counter()

    def worker(name: str) -> None:
        for job_id in made_ids:
            if claimed(database, job_id, name) is not None:
                taken[job_id] += 1

    threads = [threading.Thread(target=worker, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == Counter(dict.fromkeys(made_ids, 1))


def test_events_count_without_holes_whoever_writes(database: Database) -> None:
    (job_id,) = made(database)
    assert claimed(database, job_id) is not None

    def write(number: int) -> None:
        for step in range(10):
            with database.write() as session:
                jobs.record(session, job_id, 1, [{"type": "log", "message": f"{number}.{step}", "data": {}}])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        found = jobs.events(session, job_id)
        assert [event.seq for event in found] == list(range(1, 43))
        assert session.get_one(Job, job_id).last_seq == 42
        assert [event.seq for event in jobs.events(session, job_id, after=40)] == [41, 42]
        assert len(jobs.events(session, job_id, kind="log", limit=7)) == 7


def test_a_stale_attempt_can_do_nothing(database: Database) -> None:
    (job_id,) = made(database)
    assert claimed(database, job_id, lease=-1.0) is not None
    with database.write() as session:
        assert jobs.expired(session) == [(job_id, 1)]
        assert jobs.crashed(session, job_id, 1, reason="gone", max_crashes=3, only_expired=True) == "queued"
    assert claimed(database, job_id, "w2") is not None
    acts: list[Any] = [
        lambda session: jobs.beat(session, job_id, 1, lease_seconds=60),
        lambda session: jobs.cancel_requested(session, job_id, 1),
        lambda session: jobs.record(session, job_id, 1, [{"type": "log", "message": "late", "data": {}}]),
        lambda session: jobs.succeed(session, job_id, 1, results={}, artifacts=[], model=None),
        lambda session: jobs.fail(session, job_id, 1, {"code": "x"}),
        lambda session: jobs.cancelled(session, job_id, 1),
        lambda session: jobs.release(session, job_id, 1),
        lambda session: jobs.crashed(session, job_id, 1, reason="late", max_crashes=3),
    ]
    for act in acts:
        with pytest.raises(LostLease), database.write() as session:
            act(session)
    with database.write() as session:
        jobs.succeed(session, job_id, 2, results={"a": 1}, artifacts=[], model=None)
    assert history(database, job_id) == ["queued", "running", "queued", "running", "succeeded"]


def test_a_beat_in_time_saves_the_job_from_the_sweeper(database: Database) -> None:
    (job_id,) = made(database)
    assert claimed(database, job_id, lease=-1.0) is not None
    with database.write() as session:
        (found,) = jobs.expired(session)
        assert jobs.beat(session, job_id, 1, lease_seconds=60) is False
    with pytest.raises(LostLease), database.write() as session:
        jobs.crashed(session, *found, reason="gone", max_crashes=3, only_expired=True)
    assert status(database, job_id) == "running"


def test_crashes_without_progress_end_in_crashed(database: Database) -> None:
    (job_id,) = made(database)
    ends = []
    for attempt in range(1, 5):
        if claimed(database, job_id) is None:
            break
        with database.write() as session:
            if attempt == 2:
                jobs.record(session, job_id, attempt, [], checkpoints=[("stage", "0" * 64)])
        with database.write() as session:
            ends.append(jobs.crashed(session, job_id, attempt, reason="killed", max_crashes=2))
    assert ends == ["queued", "queued", "crashed"]
    with database.read() as session:
        job = session.get_one(Job, job_id)
        assert job.error is not None and job.error["code"] == "worker_lost"
        assert session.scalar(sa.select(Checkpoint)) is None


def test_cancel(database: Database) -> None:
    queued, running, done = made(database, 3)
    for job_id in (running, done):
        assert claimed(database, job_id) is not None
    with database.write() as session:
        jobs.succeed(session, done, 1, results={}, artifacts=[], model=None)
    found = {}
    for job_id in (queued, running, done):
        with database.write() as session:
            found[job_id] = jobs.request_cancel(session, job_id, "t1").status
    assert found == {queued: "cancelled", running: "cancelling", done: "succeeded"}
    with database.write() as session:
        assert jobs.beat(session, running, 1, lease_seconds=60) is True
        assert jobs.crashed(session, running, 1, reason="killed while cancelling", max_crashes=3) == "cancelled"
    assert claimed(database, queued) is None
    assert history(database, running) == ["queued", "running", "cancelling", "cancelled"]


def test_terminal_rows_never_change(database: Database) -> None:
    (job_id,) = made(database)
    assert claimed(database, job_id) is not None
    with database.write() as session:
        jobs.fail(session, job_id, 1, {"code": "diverged"})
    for act in (lambda s: jobs.beat(s, job_id, 1, lease_seconds=1), lambda s: jobs.succeed(s, job_id, 1, results={}, artifacts=[], model=None)):
        with pytest.raises(LostLease), database.write() as session:
            act(session)
    with database.write() as session:
        again = jobs.retry(session, job_id, "t1")
        assert (again.retry_of, again.status) == (job_id, "queued")
    with pytest.raises(NotTerminal), database.write() as session:
        jobs.retry(session, again.id, "t1")
    with pytest.raises(NotTerminal), database.write() as session:
        jobs.delete(session, again.id, "t1")
    with database.write() as session:
        jobs.delete(session, job_id, "t1")
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Event).where(Event.job_id == job_id)) == 0


def test_what_waits_is_announced_again_but_not_at_once(database: Database) -> None:
    first, second = made(database, 2)
    with database.write() as session:
        assert set(jobs.unannounced(session, older_than_seconds=30)) == {first, second}
    with database.write() as session:
        assert jobs.unannounced(session, older_than_seconds=30) == []
        assert set(jobs.unannounced(session, older_than_seconds=-1)) == {first, second}


def test_the_transition_table_is_sound() -> None:
    assert {"succeeded", "failed", "crashed", "cancelled"} == states.TERMINAL
    assert all(following <= set(states.TRANSITIONS) for following in states.TRANSITIONS.values())
    assert set(states.before("cancelled")) == {"queued", "running", "cancelling"} - {"running"}


# -- uploads, keys, answers, objects -----------------------------------------------------------------------------------


def uploaded(database: Database, table: Any = Model, sha256: str = "a" * 64, tenant: str = "t1") -> str:
    with database.write() as session:
        library.touch(session, sha256, 5)
        return library.add(session, table, tenant=tenant, name="n", filename="f", sha256=sha256, size=5, labels={}, reading_seconds=60).id


def test_uploads_are_deleted_only_when_nothing_needs_them(database: Database) -> None:
    model = uploaded(database)
    with pytest.raises(InUse), database.write() as session:
        library.delete(session, Model, model, "t1")
    with database.write() as session:
        library.settle(session, Model, model, description={"x": 1}, safe_sha256="b" * 64)
        library.settle(session, Model, model, refusal={"code": "late"})
        assert library.ready(session, Model, model, "t1").description == {"x": 1}
    (job_id,) = made(database, model_id=model)
    with pytest.raises(InUse, match=job_id), database.write() as session:
        library.delete(session, Model, model, "t1")
    with database.write() as session:
        jobs.request_cancel(session, job_id, "t1")
        library.delete(session, Model, model, "t1")
    with pytest.raises(NotFound), database.read() as session:
        library.get(session, Model, model, "t1")


def test_abandoned_uploads_are_taken_over_once(database: Database) -> None:
    with database.write() as session:
        late = library.add(session, Dataset, tenant="t", name="n", filename="f", sha256="a" * 64, size=1, labels={}, reading_seconds=-1).id
    found = []
    for _ in range(2):
        with database.write() as session:
            found.append([row.id for row in library.abandoned(session, Dataset, reading_seconds=60)])
    assert found == [[late], []]


def test_pages_visit_every_row_once(database: Database) -> None:
    wanted = {uploaded(database) for _ in range(7)}
    uploaded(database, tenant="t2")
    for newest_first in (True, False):
        seen: list[tuple[float, str]] = []
        cursor = None
        while True:
            with database.read() as session:
                rows, cursor = library.page(session, Model, "t1", limit=3, after=cursor, newest_first=newest_first)
                # Identifiers of one millisecond are in no order.
                seen += [(row.created_at, row.id) for row in rows]
            if cursor is None:
                break
        assert len(seen) == 7 and {name for _, name in seen} == wanted
        assert seen == sorted(seen, reverse=newest_first)
    with pytest.raises(NotFound), database.read() as session:
        library.page(session, Model, "t2", limit=3, after=seen[0][1])


def test_objects_are_forgotten_when_no_row_needs_them(database: Database) -> None:
    kept = uploaded(database, sha256="a" * 64)
    with database.write() as session:
        library.touch(session, "c" * 64, 9)
        library.touch(session, "c" * 64, 9)
    with database.write() as session:
        assert library.unreferenced(session, older_than_seconds=60) == []
        session.execute(sa.update(Object).values(touched_at=now() - 3600))
    with database.write() as session:
        assert library.unreferenced(session, older_than_seconds=60) == ["c" * 64]
        library.settle(session, Model, kept, refusal={"code": "x"})
        library.delete(session, Model, kept, "t1")
    with database.write() as session:
        assert library.unreferenced(session, older_than_seconds=60) == ["a" * 64]


def test_keys_are_found_by_digest_and_revoked(database: Database) -> None:
    with database.write() as session:
        key, secret = keys.create(session, tenant=None, name="k", scopes=["read"])
    with database.read() as session:
        found, moment = keys.find(session, secret)
        assert found is not None and found.id == key.id and moment > 1e9
        assert keys.find(session, secret + "x")[0] is None
        assert secret not in str(session.execute(sa.text("select * from key")).all())
    with pytest.raises(NotFound), database.write() as session:
        keys.revoke(session, key.id, "another")
    with database.write() as session:
        keys.revoke(session, key.id, key.tenant)
    with pytest.raises(NotFound), database.write() as session:
        keys.revoke(session, key.id, key.tenant)


def test_a_request_with_a_key_happens_once_even_at_the_same_time(database: Database) -> None:
    with database.write() as session:
        key, _ = keys.create(session, tenant="t1", name="k", scopes=["write"])
    done: list[tuple[dict[str, Any], bool]] = []
    calls: list[int] = []

    def ask() -> None:
        def act(session: Any) -> dict[str, Any]:
            calls.append(1)
            return {"id": ids.new("job")}

        done.append(idempotency.once(database, key_id=key.id, route="r", value="v", request={"a": 1}, act=act))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["id"] for answer, _ in done}) == 1
    assert sum(not replayed for _, replayed in done) == 1
    with pytest.raises(KeyReused):
        idempotency.once(database, key_id=key.id, route="r", value="v", request={"a": 2}, act=lambda session: {})


# -- the schema ------------------------------------------------------------------------------------------------------


def test_migrations_make_exactly_the_tables(database: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.engine.connect() as connection:
        difference = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": False}), Table.metadata)
    assert difference == []
    assert len(set(database.revision())) == 1
    database.migrate()


def test_a_migration_keeps_what_refers_to_a_job(database: Database) -> None:
    from alembic import command

    config = database._alembic()
    config.attributes["engine"] = database.engine
    (kept,) = made(database)
    with database.read() as session:
        before = len(session.scalars(sa.select(Event).where(Event.job_id == kept)).all())
    command.downgrade(config, "0001")
    with database.engine.connect() as connection:
        columns = {column["name"] for column in sa.inspect(connection).get_columns("job")}
        assert "triggered_dataset_id" not in columns
        assert connection.scalar(sa.text("select count(*) from event")) == before > 0
    database.migrate()
    with database.read() as session:
        assert jobs.get(session, kept, "t1").triggered_dataset_id is None
        assert len(session.scalars(sa.select(Event).where(Event.job_id == kept)).all()) == before
    with pytest.raises(sa.exc.IntegrityError), database.engine.connect() as connection:
        connection.execute(sa.text("insert into event (id, job_id, seq, at, type, message, data) values ('evt', 'nobody', 1, 0, 'log', '', '{}')"))
        connection.commit()


def test_the_last_migration_can_be_taken_back(database: Database) -> None:
    from alembic import command

    config = database._alembic()
    config.attributes["engine"] = database.engine
    command.downgrade(config, "base")
    assert "job" not in sa.inspect(database.engine).get_table_names()
    database.migrate()
    assert "job" in sa.inspect(database.engine).get_table_names()


def test_ids_sort_by_time_and_are_safe_names() -> None:
    found = [ids.new("job") for _ in range(200)]
    assert len(set(found)) == 200 and all(ids.PATTERN.fullmatch(one) for one in found)
    assert found[0][:12] <= found[-1][:12]

"""One engine for SQLite and Postgres: short transactions, the database's clock, migrations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import FunctionElement

from store.errors import StoreUnavailable

Answer = TypeVar("Answer")
MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


class now(FunctionElement[float]):  # noqa: N801 - reads like the SQL it becomes
    """The database's clock, seconds since 1970; leases never trust a worker's."""

    type = sa.Float(53)
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(element: now, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgres_now(element: now, compiler: Any, **options: Any) -> str:
    return "(extract(epoch from clock_timestamp())::double precision)"


class Database:
    """Opens transactions on the database at `url`."""

    def __init__(self, url: str) -> None:
        self.url = sa.make_url(url)
        if self.url.drivername == "postgresql":
            self.url = self.url.set(drivername="postgresql+psycopg")
        options: dict[str, Any] = {"pool_pre_ping": True, "pool_size": 10, "max_overflow": 30}
        if self.url.get_backend_name() == "sqlite":
            if self.url.database:
                Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
            options = {"connect_args": {"timeout": 60, "check_same_thread": False}, "pool_size": 20, "max_overflow": 30}
        self.engine = sa.create_engine(self.url, **options)
        if self.url.get_backend_name() == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    async def ask(self, question: Callable[[], Answer]) -> Answer:
        """Return `question()`, which reads a row or two, without holding up other requests.

        In SQLite such a read takes a tenth of a millisecond and waits for no writer: a thread would cost more than it saves.
        """
        if self.url.get_backend_name() == "sqlite":
            return question()
        return await asyncio.to_thread(question)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a session for reading.

        Raises `StoreUnavailable` when the database does not answer.
        """
        with self._session(writes=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a session that commits at the end, or rolls back on an error.

        Raises `StoreUnavailable` when the database does not answer.
        """
        with self._session(writes=True) as session:
            yield session
            session.commit()

    @contextmanager
    def _session(self, *, writes: bool) -> Iterator[Session]:
        try:
            with Session(self.engine, expire_on_commit=False) as session:
                session.connection(execution_options={"writes": writes})
                yield session
        except OperationalError as error:
            raise StoreUnavailable(f"the database does not answer: {error.orig}") from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise StoreUnavailable(f"the database went away: {error.orig}") from error
            raise

    def migrate(self) -> None:
        """Bring the schema to the newest migration."""
        from alembic import command

        with self.engine.connect() as connection:
            # Two processes that start together must not migrate together.
            if self.url.get_backend_name() == "postgresql":
                connection.execute(sa.text("select pg_advisory_lock(7266121)"))
            config = self._alembic()
            config.attributes["engine"] = self.engine
            try:
                command.upgrade(config, "head")
            finally:
                if self.url.get_backend_name() == "postgresql":
                    connection.execute(sa.text("select pg_advisory_unlock(7266121)"))

    def revision(self) -> tuple[str | None, str | None]:
        """Return (the schema's migration, the newest one)."""
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        with self.engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        return current, ScriptDirectory.from_config(self._alembic()).get_current_head()

    def _alembic(self) -> Any:
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        return config


def _prepare_sqlite(connection: Any, record: Any) -> None:
    # The driver must not begin transactions by itself: `_begin_sqlite` says which kind.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=NORMAL", "busy_timeout=60000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred transaction that reads first cannot wait for another writer; a writing one must begin as such.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")

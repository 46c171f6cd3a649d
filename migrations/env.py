"""Runs the migrations on the engine that store/database.py hands over."""

from __future__ import annotations

from alembic import context

from store.tables import Table

engine = context.config.attributes["engine"]
with engine.connect() as connection:
    sqlite = engine.dialect.name == "sqlite"
    raw = connection.connection.dbapi_connection
    if sqlite:
        # SQLite alters a table by making a new one and dropping the old, and a drop deletes what refers to it.
        # The switch has no effect inside a transaction, so it is thrown before one begins.
        raw.execute("PRAGMA foreign_keys=OFF")
    try:
        context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True, compare_type=False)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
    finally:
        if sqlite:
            connection.rollback()
            raw.execute("PRAGMA foreign_keys=ON")

"""Runs the migrations on the engine that store/database.py hands over."""

from __future__ import annotations

from alembic import context

from store.tables import Table

engine = context.config.attributes["engine"]
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True, compare_type=False)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()

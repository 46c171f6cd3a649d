"""Alembic: one tree for SQLite and Postgres."""

"""The Celery floor: takes a job id, holds its lease, runs the engine as a child, stores what comes out."""

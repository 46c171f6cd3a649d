"""`python -m worker`: one worker, one job at a time."""

from __future__ import annotations

import sys
import warnings

from celery.platforms import SecurityWarning

from worker.tasks import app, configure_logs, floors


def main() -> int:
    """Start the worker; returns when it was stopped."""
    configure_logs()
    floors()[0].migrate()
    # Celery warns root off because pickled messages could run code; this worker accepts JSON only.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    app.worker_main(
        [
            "--quiet",
            "worker",
            "--pool=prefork",
            "--concurrency=1",
            "--queues=gpu",
            "--loglevel=ERROR",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
        ]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The life of a job as data."""

from __future__ import annotations

QUEUED, RUNNING, CANCELLING = "queued", "running", "cancelling"
SUCCEEDED, FAILED, CRASHED, CANCELLED = "succeeded", "failed", "crashed", "cancelled"

# What may follow what. A crash takes a job back to the queue until `crashed` gives it up.
TRANSITIONS: dict[str, frozenset[str]] = {
    QUEUED: frozenset({RUNNING, CANCELLED, CRASHED}),
    RUNNING: frozenset({SUCCEEDED, FAILED, CRASHED, CANCELLING, QUEUED}),
    CANCELLING: frozenset({CANCELLED}),
    SUCCEEDED: frozenset(),
    FAILED: frozenset(),
    CRASHED: frozenset(),
    CANCELLED: frozenset(),
}
TERMINAL = frozenset(state for state, following in TRANSITIONS.items() if not following)
ACTIVE = frozenset({RUNNING, CANCELLING})


def before(state: str) -> tuple[str, ...]:
    """Return the states from which a job may enter `state`."""
    return tuple(name for name, following in TRANSITIONS.items() if state in following)

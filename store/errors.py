"""What the store refuses to do, as codes that every floor understands."""

from __future__ import annotations


class StoreError(Exception):
    """A request that contradicts what is stored.

    Attributes:
        code: a code of the problem catalogue.
    """

    code = "internal"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class NotFound(StoreError):
    """It does not exist, or belongs to somebody else."""

    code = "not_found"


class InUse(StoreError):
    """Something still needs it."""

    code = "in_use"


class NotReady(StoreError):
    """The upload was not (yet) taken in."""

    code = "not_ready"


class OffsetMismatch(StoreError):
    """The part does not begin where the last one ended, or parts are missing.

    Attributes:
        offset: where to go on.
    """

    code = "offset_mismatch"

    def __init__(self, detail: str, offset: int) -> None:
        super().__init__(detail)
        self.offset = offset


class QuotaExceeded(StoreError):
    """The tenant has reached a limit."""

    code = "quota_exceeded"


class NotTerminal(StoreError):
    """The job is still under way."""

    code = "not_terminal"


class KeyReused(StoreError):
    """The idempotency key was used with another request."""

    code = "idempotency_key_reused"


class LostLease(StoreError):
    """Another worker owns the job now."""

    code = "lost_lease"


class StoreUnavailable(StoreError):
    """The database or the object store does not answer."""

    code = "store_unavailable"


class StoreFull(StoreError):
    """The disk behind the object store is full."""

    code = "storage_full"

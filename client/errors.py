"""What can go wrong between a program and the service."""

from __future__ import annotations

from typing import Any


class UnpoisonError(Exception):
    """Base of everything the client raises."""


class ApiError(UnpoisonError):
    """The service answered with a problem (RFC 9457).

    Attributes:
        code: the problem's code; `status` its HTTP status.
        errors: `{pointer, code, detail}` for each bad field.
        request_id: what to quote when reporting it.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code: str = problem.get("code", "unknown")
        self.detail: str = problem.get("detail", f"HTTP {status}")
        self.errors: list[dict[str, str]] = problem.get("errors", [])
        self.request_id: str = problem.get("request_id", "")
        self.retryable: bool = problem.get("retryable", False)
        super().__init__(f"{self.code}: {self.detail}")


class AuthenticationError(ApiError):
    """401: no key, a wrong one, or an expired one."""


class PermissionDenied(ApiError):
    """403: the key lacks a scope."""


class NotFound(ApiError):
    """404: it does not exist, or is not yours."""


class Conflict(ApiError):
    """409: the state of things forbids it now."""


class Rejected(ApiError):
    """4xx else: the request or the file was refused."""


class ServerError(ApiError):
    """5xx: the service has a problem."""


class ConnectionFailed(UnpoisonError):
    """The service cannot be reached."""


class DigestMismatch(UnpoisonError):
    """A download does not have the digest the service announced."""


class WaitTimeout(UnpoisonError):
    """The job did not end in time; it goes on."""


class JobFailed(UnpoisonError):
    """The job ended without success.

    Attributes:
        job: the job as the service describes it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        error = job.get("error") or {}
        super().__init__(f"job {job['id']} {job['status']}" + (f": {error['detail'].rstrip('.')}. {error.get('advice', '')}" if error else ""))


def from_response(status: int, problem: dict[str, Any]) -> ApiError:
    """Return the error class of an HTTP status."""
    kinds: dict[int, type[ApiError]] = {401: AuthenticationError, 403: PermissionDenied, 404: NotFound, 409: Conflict}
    return kinds.get(status, ServerError if status >= 500 else Rejected)(status, problem)

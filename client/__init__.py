"""The Python client: `Client` and `AsyncClient` have the same surface."""

from client.errors import ApiError, ConnectionFailed, DigestMismatch, JobFailed, WaitTimeout
from client.sessions import AsyncClient, Client

__all__ = ["ApiError", "AsyncClient", "Client", "ConnectionFailed", "DigestMismatch", "JobFailed", "WaitTimeout"]

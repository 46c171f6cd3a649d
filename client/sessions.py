"""`Client` and `AsyncClient`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from client._http import AsyncTransport, SyncTransport
from client.resources import Artifacts, Audit, Jobs, Keys, Methods, Transport, Uploads

DEFAULT_URL = "http://127.0.0.1:8642"


def profile() -> dict[str, str]:
    """Return what `unpoison serve` noted for this user's own machine: url and api_key."""
    folder = Path(os.environ.get("UNPOISON_DATA_FOLDER", Path.home() / ".local" / "share" / "unpoison"))
    try:
        found: dict[str, str] = json.loads((folder / "client.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def settings(url: str | None, api_key: str | None) -> tuple[str, str]:
    """Return URL and key: what is given, else UNPOISON_URL and UNPOISON_API_KEY, else the local service's."""
    known = profile()
    found_url = url or os.environ.get("UNPOISON_URL") or known.get("url") or DEFAULT_URL
    # The local key is for the local service only.
    own = known.get("api_key", "") if found_url == known.get("url") else ""
    return found_url, api_key or os.environ.get("UNPOISON_API_KEY") or own


class _Surface:
    def _open(self, transport: Transport) -> None:
        self.models = Uploads(transport, "models")
        self.datasets = Uploads(transport, "datasets")
        self.methods = Methods(transport)
        self.jobs = Jobs(transport)
        self.artifacts = Artifacts(transport)
        self.keys = Keys(transport)
        self.audit = Audit(transport)


class Client(_Surface):
    """The service over HTTP, blocking.

    Args:
        url, api_key: see `settings`.
        retries: how often a request is tried again after a lost connection or a retryable answer.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, retries: int = 3) -> None:
        self.url, key = settings(url, api_key)
        self._transport = SyncTransport(self.url, key, retries)
        self._open(self._transport)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *ignored: Any) -> None:
        """Close the connections."""
        self.close()


class AsyncClient(_Surface):
    """The same surface; every method returns an awaitable, `jobs.stream` an async iterator."""

    def __init__(self, url: str | None = None, api_key: str | None = None, *, retries: int = 3) -> None:
        self.url, key = settings(url, api_key)
        self._transport = AsyncTransport(self.url, key, retries)
        self._open(self._transport)

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *ignored: Any) -> None:
        """Close the connections."""
        await self.close()

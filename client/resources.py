"""The surface: one set of methods for both clients. `AsyncClient`'s return awaitables of the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from client import flows
from client.errors import JobFailed
from client.flows import Flow, Json, Progress

Result = Any


class Transport(Protocol):
    """What drives a flow."""

    def drive(self, flow: Flow) -> Any:
        """Run a flow; return its value, or an awaitable of it."""
        ...

    def events(self, path: str, after: int) -> Any:
        """Iterate over server-sent events."""
        ...


class Resource:
    """Part of the API, over a transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _call(self, method: str, path: str, **parts: Any) -> Result:
        return self._transport.drive(flows.simple(method, path, **parts))


class Uploads(Resource):
    """Models, or datasets."""

    def __init__(self, transport: Transport, kind: str) -> None:
        super().__init__(transport)
        self._kind = kind

    def upload(
        self, path: str | Path, *, name: str | None = None, resize: int | None = None, progress: Progress | None = None, timeout: float = 3600.0
    ) -> Result:
        """Upload a file and wait until it was read; `progress(sent, total)` in bytes.

        `resize` makes every picture of a data set a square of that many pixels. Raises `Rejected` with the reason when it is refused.
        """
        return self._transport.drive(flows.upload(self._kind, Path(path), name=name, resize=resize, progress=progress, timeout=timeout))

    def inspect(self, path: str | Path, *, resize: int | None = None, progress: Progress | None = None) -> Result:
        """Say what a file would be, or raise `Rejected` with the reason; nothing is stored."""
        params = {"filename": Path(path).name, "validate_only": "true", **({"resize": resize} if resize else {})}
        return self._call("POST", f"/v1/{self._kind}", params=params, upload=Path(path), progress=progress)

    def get(self, upload_id: str) -> Result:
        """Return one."""
        return self._call("GET", f"/v1/{self._kind}/{upload_id}")

    def list(self, **filters: Any) -> Result:
        """Return all, newest first."""
        return self._transport.drive(flows.pages(f"/v1/{self._kind}", {"limit": 100, **filters}))

    def delete(self, upload_id: str) -> Result:
        """Delete one; refused while a job needs it."""
        return self._call("DELETE", f"/v1/{self._kind}/{upload_id}")

    def download(self, upload_id: str, path: str | Path, *, progress: Progress | None = None) -> Result:
        """Download the bytes as they were uploaded, verified; resumes by itself."""
        return self._call("GET", f"/v1/{self._kind}/{upload_id}/content", download=Path(path), progress=progress)


class Methods(Resource):
    """The catalogue."""

    def list(self) -> Result:
        """Return every method."""
        return self._transport.drive(flows.pages("/v1/methods", {}))

    def get(self, name: str) -> Result:
        """Return one method with the schema of its parameters."""
        return self._call("GET", f"/v1/methods/{name}")

    def propose(self, *have: str) -> Result:
        """Return the jobs worth trying with what there is: model, clean_images, clean_labels, suspect_dataset."""
        return self._transport.drive(flows.pages("/v1/proposals", {"have": list(have)}))


class Jobs(Resource):
    """Jobs."""

    def create(
        self,
        *,
        model: str | Json | None = None,
        dataset: str | Json | None = None,
        suspect_dataset: str | Json | None = None,
        defense: Json,
        evaluation: Json | None = None,
        seed: int = 0,
        validate_only: bool = False,
        **more: Any,
    ) -> Result:
        """Queue a job.

        `model`, `dataset` (the clean images) and `suspect_dataset` (the untrusted training set), as far as the method needs them, are ids or what
        `upload` returned.
        """
        body = {
            "model_id": _id(model),
            "dataset_id": _id(dataset),
            "suspect_dataset_id": _id(suspect_dataset),
            "defense": defense,
            "evaluation": evaluation,
            "seed": seed,
            **more,
        }
        return self._call("POST", "/v1/jobs", json=body, params={"validate_only": "true"} if validate_only else {})

    def get(self, job_id: str) -> Result:
        """Return a job."""
        return self._call("GET", f"/v1/jobs/{job_id}")

    def list(self, **filters: Any) -> Result:
        """Return all jobs, newest first; filters: status, method, model_id."""
        return self._transport.drive(flows.pages("/v1/jobs", {"limit": 100, **filters}))

    def wait(self, job_id: str, *, timeout: float | None = None, seen: Callable[[Json], None] | None = None) -> Result:
        """Wait for a job's end and return it; `seen(job)` is called at each change.

        Raises `WaitTimeout`; the job goes on.
        """
        return self._transport.drive(flows.wait(job_id, timeout=timeout, seen=seen))

    def stream(self, job_id: str, *, after: int = 0) -> Any:
        """Iterate over a job's events as they happen; reconnects by itself."""
        return self._transport.events(f"/v1/jobs/{job_id}/events/stream", after)

    def events(self, job_id: str) -> Result:
        """Return the events so far."""
        return self._transport.drive(flows.pages(f"/v1/jobs/{job_id}/events", {"limit": 1000}))

    def cancel(self, job_id: str) -> Result:
        """Stop a job."""
        return self._call("POST", f"/v1/jobs/{job_id}/cancel")

    def retry(self, job_id: str) -> Result:
        """Run a finished job again."""
        return self._call("POST", f"/v1/jobs/{job_id}/retry")

    def delete(self, job_id: str) -> Result:
        """Delete a finished job with its artifacts."""
        return self._call("DELETE", f"/v1/jobs/{job_id}")

    def artifacts(self, job_id: str) -> Result:
        """Return what a job gave back."""
        return self._transport.drive(flows.pages(f"/v1/jobs/{job_id}/artifacts", {}))

    def report(self, job_id: str) -> Result:
        """Return a job's report."""
        return self._call("GET", f"/v1/jobs/{job_id}/report")


class Artifacts(Resource):
    """Files that jobs gave back."""

    def get(self, artifact_id: str) -> Result:
        """Describe one."""
        return self._call("GET", f"/v1/artifacts/{artifact_id}")

    def download(self, artifact_id: str, path: str | Path, *, progress: Progress | None = None) -> Result:
        """Download one, verified; resumes by itself."""
        return self._call("GET", f"/v1/artifacts/{artifact_id}/content", download=Path(path), progress=progress)


class Keys(Resource):
    """API keys; needs the scope `admin`."""

    def create(self, *, name: str, scopes: list[str], expires_in_seconds: float | None = None) -> Result:
        """Make a key; its `secret` is in the answer and never again."""
        return self._call("POST", "/v1/keys", json={"name": name, "scopes": scopes, "expires_in_seconds": expires_in_seconds})

    def list(self) -> Result:
        """Return the tenant's keys."""
        return self._transport.drive(flows.pages("/v1/keys", {"limit": 100}))

    def revoke(self, key_id: str) -> Result:
        """Make a key useless."""
        return self._call("DELETE", f"/v1/keys/{key_id}")


class Audit(Resource):
    """The audit log; needs the scope `admin`."""

    def list(self) -> Result:
        """Return who changed or took away what, newest first."""
        return self._transport.drive(flows.pages("/v1/audit", {"limit": 100}))


def succeeded(job: Json) -> Json:
    """Return the job if it succeeded.

    Raises `JobFailed` with the reason otherwise.
    """
    if job["status"] != "succeeded":
        raise JobFailed(job)
    return job


def _id(thing: str | Json | None) -> str | None:
    return thing if isinstance(thing, str) or thing is None else str(thing["id"])

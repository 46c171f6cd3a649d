"""Limits of a tenant: files, bytes, jobs."""

from __future__ import annotations

from typing import Any

import pytest

from client import ApiError
from service.problems import CATALOGUE
from tests.conftest import Case, StackMaker, upload


def refused(act: Any, words: str) -> None:
    with pytest.raises(ApiError, match=words) as refusal:
        act()
    assert refusal.value.code == "quota_exceeded" and refusal.value.status == CATALOGUE["quota_exceeded"].status


def test_each_tenant_has_its_own_limits(make_stack: StackMaker, case: Case) -> None:
    size = case.model.stat().st_size + case.clean.stat().st_size + case.test.stat().st_size
    stack = make_stack("laptop", UNPOISON_QUOTA_UPLOADS="4", UNPOISON_QUOTA_BYTES=str(size + 1000), UNPOISON_QUOTA_JOBS="1")
    stack.start_api()
    with stack.client(retries=0) as client, stack.client(retries=0) as other:
        uploaded = upload(client, case)
        refused(lambda: client.models.upload(case.model), "bytes would be kept")
        http: Any = client._transport._http  # type: ignore[attr-defined]

        def in_pieces() -> Any:
            yield case.model.read_bytes()

        # Without a length the body is counted when it has arrived.
        answer = http.post("/v1/models", content=in_pieces(), headers={"Content-Type": "application/octet-stream"})
        assert answer.json()["code"] == "quota_exceeded" and len(client.models.list()) == 1
        begun = http.post("/v1/uploads", json={"kind": "model", "bytes": 900})
        assert begun.status_code == 201
        assert http.post("/v1/uploads", json={"kind": "model", "bytes": 1}).json()["detail"].startswith("4 models and data sets")
        assert http.delete(f"/v1/uploads/{begun.json()['id']}").status_code == 204
        assert http.post("/v1/uploads", json={"kind": "model", "bytes": 1001}).json()["code"] == "quota_exceeded"

        job = uploaded.job(client)
        refused(lambda: uploaded.job(client), "1 jobs are under way")
        client.jobs.cancel(job["id"])
        again = client.jobs.retry(job["id"])
        refused(lambda: client.jobs.retry(job["id"]), "wait for one to end")
        client.jobs.cancel(again["id"])
        # Another tenant is not touched by any of it.
        assert upload(other, case).job(other)["status"] == "queued"

"""The generated documents say all that there is to say."""

from __future__ import annotations

import re

from benchmarks import documents


def test_every_ending_of_a_job_is_explained() -> None:
    sources = [*(documents.ROOT / "worker").glob("*.py"), documents.ROOT / "store" / "jobs.py"]
    written = {code for source in sources for code in re.findall(r'"code": "(\w+)"', source.read_text())}
    explained = documents.endings()
    assert written and written <= set(explained) and "internal" not in explained and all(explained.values())

"""Objects, on a folder and on S3 over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.errors import NotFound, StoreUnavailable
from store.objects import Objects


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Objects]:
    if request.param == "folder":
        yield Objects(f"file://{tmp_path / 'objects'}")
    else:
        yield Objects(f"{request.getfixturevalue('s3_server')}/{tmp_path.name}")


def blob(tmp_path: Path, size: int = 3_000_000) -> tuple[Path, str]:
    path = tmp_path / "blob"
    path.write_bytes(bytes(range(256)) * (size // 256))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_put_fetch_stream_delete(objects: Objects, tmp_path: Path) -> None:
    path, digest = blob(tmp_path)
    assert objects.put(path, tmp_path) == (digest, path.stat().st_size)
    assert objects.put(path, tmp_path)[0] == digest
    assert objects.exists(digest) and objects.digests() == {digest}
    objects.fetch(digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()

    async def part(start: int, end: int) -> bytes:
        return b"".join([piece async for piece in objects.stream(digest, start, end)])

    whole = path.read_bytes()
    for start, end in ((0, len(whole)), (5, 6), (1_000_000, 2_500_000), (7, 7)):
        assert asyncio.run(part(start, end)) == whole[start:end]
    assert not list(objects.incoming(tmp_path).iterdir())
    objects.delete(digest)
    objects.delete(digest)
    assert not objects.exists(digest)
    with pytest.raises(NotFound):
        objects.fetch(digest, tmp_path / "back")


def test_adopted_files_move(objects: Objects, tmp_path: Path) -> None:
    incoming = objects.incoming(tmp_path) / "x"
    incoming.write_bytes(b"hello")
    digest = hashlib.sha256(b"hello").hexdigest()
    objects.adopt(incoming, digest)
    assert not incoming.exists() and objects.exists(digest)


def test_what_killed_processes_left_is_removed(objects: Objects, tmp_path: Path) -> None:
    folder = objects.incoming(tmp_path)
    for name in ("old", "new"):
        (folder / name).write_bytes(b"half")
    (folder / "reading").mkdir()
    for name in ("old", "reading"):
        os.utime(folder / name, (0, 0))
    objects.forget_incoming(tmp_path, older_than_seconds=3600)
    assert [left.name for left in folder.iterdir()] == ["new"]


def test_damage_is_noticed(tmp_path: Path) -> None:
    objects = Objects(f"file://{tmp_path / 'objects'}")
    path, digest = blob(tmp_path)
    objects.put(path, tmp_path)
    (tmp_path / "objects" / "sha256" / digest[:2] / digest).write_bytes(b"other bytes")
    with pytest.raises(StoreUnavailable, match="damaged"):
        objects.fetch(digest, tmp_path / "back")


def test_names_are_digests_only(objects: Objects) -> None:
    with pytest.raises(ValueError):
        objects.exists("../../etc/passwd")

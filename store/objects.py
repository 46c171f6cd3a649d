"""Blobs by SHA-256 on a local folder, S3, GCS or Azure; what is there is whole."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from store.errors import NotFound, StoreFull, StoreUnavailable

CHUNK = 1 << 20
STREAM_BLOCK = 2 << 20
# A full disk, a quota, a limit on the size of files: to whoever waits for the bytes to be kept they are the same.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DIGEST = re.compile(r"[0-9a-f]{64}")


class Objects:
    """The object store at `url` (`file:///folder`, `s3://bucket/prefix`, …; credentials from the environment).

    With an `upload_endpoint` it signs URLs that clients send parts of files to; raises `ValueError` for a folder, which cannot sign.
    """

    def __init__(self, url: str, upload_endpoint: str = "") -> None:
        self.url = url
        self._folder = Path(url.removeprefix("file://")) if url.startswith("file://") else None
        if self._folder is not None:
            (self._folder / "incoming").mkdir(parents=True, exist_ok=True)
            self._store: Any = LocalStore(self._folder)
        else:
            self._store = from_url(url, **_plain_http(os.environ.get("AWS_ENDPOINT_URL", "")))
        self._signer: Any = None
        if upload_endpoint and self._folder is not None:
            raise ValueError(f"UNPOISON_UPLOAD_ENDPOINT is set, but the folder {self._folder} cannot sign URLs; leave it empty or use an object store")
        if upload_endpoint:
            self._signer = self._store if upload_endpoint == "cloud" else from_url(url, endpoint=upload_endpoint, **_plain_http(upload_endpoint))

    @property
    def signs(self) -> bool:
        """Whether clients may send parts straight to the store."""
        return self._signer is not None

    def sign_part(self, owner: str, offset: int, seconds: float) -> str:
        """Return a URL that takes one part of `owner`'s file by PUT, for so long."""
        url: str = obstore.sign(self._signer, "PUT", _part_key(owner, offset), timedelta(seconds=seconds))
        return url

    def parts(self, owner: str) -> dict[int, int]:
        """Return what clients have put there for `owner`, {offset: bytes}; raises `StoreUnavailable`."""
        return {int(item["path"].rsplit("/", 1)[-1]): item["size"] for item in self._listed(f"parts/{owner}")}

    def fetch_part(self, owner: str, offset: int, path: Path) -> None:
        """Write a part to `path`, whatever its bytes are; raises `NotFound`, `StoreFull`, `StoreUnavailable`."""
        self._write(_part_key(owner, offset), path)

    def forget_parts(self, owner: str) -> None:
        """Remove `owner`'s parts; raises `StoreUnavailable`."""
        for item in self._listed(f"parts/{owner}"):
            self._remove(item["path"])

    def part_owners(self) -> set[str]:
        """Return who has parts in the store; raises `StoreUnavailable`."""
        return {item["path"].rsplit("/", 2)[-2] for item in self._listed("parts")}

    def _listed(self, prefix: str) -> list[Any]:
        try:
            return [item for batch in obstore.list(self._store, prefix) for item in batch]
        except BaseError as error:
            raise StoreUnavailable(f"the object store does not answer: {error}") from error

    def incoming(self, scratch: Path) -> Path:
        """Return the folder to write new files into: on the same disk where a rename is enough to store them."""
        folder = self._folder / "incoming" if self._folder is not None else scratch / "incoming"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def forget_incoming(self, scratch: Path, *, older_than_seconds: float) -> None:
        """Remove incoming files that nobody has written to for a while: their process was killed."""
        for left in self.incoming(scratch).iterdir():
            # Another process may finish with it, or remove it, at the same moment.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > older_than_seconds:
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink()

    def adopt(self, path: Path, sha256: str) -> None:
        """Store the file at `path` under its digest and remove it; nobody ever sees half of it.

        Raises `StoreFull`, `StoreUnavailable`.
        """
        try:
            if self._folder is None:
                obstore.put(self._store, _key(sha256), path, chunk_size=16 << 20)
                path.unlink()
                return
            target = self._folder / _key(sha256)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            raise _translated(error) from error
        except BaseError as error:
            raise StoreUnavailable(f"the object store does not answer: {error}") from error

    def put(self, path: Path, scratch: Path) -> tuple[str, int]:
        """Store a copy of a file; return its SHA-256 and size. The file may be replaced meanwhile, not rewritten.

        Raises `StoreFull`, `StoreUnavailable`.
        """
        copy = self.incoming(scratch) / f"{os.getpid()}-{os.urandom(8).hex()}"
        digest = hashlib.sha256()
        try:
            with path.open("rb") as source, copy.open("wb") as out:
                while piece := source.read(CHUNK):
                    digest.update(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            size = copy.stat().st_size
            self.adopt(copy, digest.hexdigest())
        except OSError as error:
            raise _translated(error) from error
        finally:
            copy.unlink(missing_ok=True)
        return digest.hexdigest(), size

    def take(self, path: Path, scratch: Path) -> tuple[str, int]:
        """Store a file that nobody else uses, by moving it if possible; return its SHA-256 and size.

        Raises `StoreFull`, `StoreUnavailable`.
        """
        if self._folder is None or path.stat().st_dev != self._folder.stat().st_dev:
            return self.put(path, scratch)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        size = path.stat().st_size
        self.adopt(path, digest)
        return digest, size

    def local(self, sha256: str) -> Path | None:
        """Return where an object lies on this machine's disk, for reading only; None when it does not."""
        if self._folder is None:
            return None
        path = self._folder / _key(sha256)
        return path if path.exists() else None

    def fetch(self, sha256: str, path: Path) -> None:
        """Write an object to `path` and verify it.

        Raises `NotFound`, `StoreFull`, `StoreUnavailable`; also when the bytes do not have the digest.
        """
        if self._write(_key(sha256), path) != sha256:
            raise StoreUnavailable(f"object {sha256} is damaged in the store")

    def _write(self, key: str, path: Path) -> str:
        digest = hashlib.sha256()
        try:
            with path.open("wb") as out:
                for piece in obstore.get(self._store, key).stream(min_chunk_size=CHUNK):
                    digest.update(piece)
                    out.write(piece)
        except FileNotFoundError as error:
            raise NotFound(f"object {key.rsplit('/', 1)[-1]} is gone") from error
        except OSError as error:
            raise _translated(error) from error
        except BaseError as error:
            raise StoreUnavailable(f"the object store does not answer: {error}") from error
        return digest.hexdigest()

    async def stream(self, sha256: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Yield the bytes [start, end) of an object.

        Raises `NotFound`, `StoreUnavailable`.
        """
        if start == end:
            return
        path = self.local(sha256)
        if path is not None:
            # Straight from the file: the store's own stream comes in small pieces.
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                while start < end and (block := await asyncio.to_thread(file.read, min(STREAM_BLOCK, end - start))):
                    start += len(block)
                    yield block
            return
        try:
            options: Any = {"range": (start, end)}
            found = await obstore.get_async(self._store, _key(sha256), options=options)
            async for piece in found.stream(min_chunk_size=CHUNK):
                yield bytes(piece)
        except FileNotFoundError as error:
            raise NotFound(f"object {sha256} is gone") from error
        except BaseError as error:
            raise StoreUnavailable(f"the object store does not answer: {error}") from error

    def exists(self, sha256: str) -> bool:
        """Say whether an object is there."""
        try:
            obstore.head(self._store, _key(sha256))
        except FileNotFoundError:
            return False
        except BaseError as error:
            raise StoreUnavailable(f"the object store does not answer: {error}") from error
        return True

    def delete(self, sha256: str) -> None:
        """Remove an object; a missing one is no error."""
        self._remove(_key(sha256))

    def _remove(self, key: str) -> None:
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return
        except BaseError as error:
            raise StoreUnavailable(f"the object store does not answer: {error}") from error

    def digests(self) -> set[str]:
        """Return all digests stored; slow, for tests and repair."""
        return {item["path"].rsplit("/", 1)[-1] for batch in obstore.list(self._store, "sha256") for item in batch}


def _key(sha256: str) -> str:
    if not DIGEST.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is not a SHA-256 in hex")
    return f"sha256/{sha256[:2]}/{sha256}"


def _part_key(owner: str, offset: int) -> str:
    return f"parts/{owner}/{offset:020d}"


def _plain_http(endpoint: str) -> dict[str, Any]:
    return {"client_options": {"allow_http": True}} if endpoint.startswith("http://") else {}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _translated(error: OSError) -> StoreFull | StoreUnavailable:
    if error.errno in NO_SPACE:
        return StoreFull("the disk is full")
    return StoreUnavailable(f"the object store cannot be written: {error.strerror}")

"""Archives of files: zip, tar, tar.gz, tar.zst. Names, kinds and sizes are checked before a byte of content is used."""

from __future__ import annotations

import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from intake.refusal import Refusal, damaged, printable

MAX_ENTRIES = 2_000_000
MAX_RATIO = 200
CHUNK = 1 << 20
ZIP, GZIP, ZSTD = (b"PK\x03\x04", b"PK\x05\x06"), b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Member:
    """One file of an archive.

    Attributes:
        size: what the archive claims; `pieces` never yields more.
        pieces: yields the content; raises `Refusal`.
    """

    name: str
    size: int
    pieces: Callable[[], Iterator[bytes]]

    def read(self) -> bytes:
        """Return the whole content."""
        return b"".join(self.pieces())


def members(file: BinaryIO, size: int, folder: Path) -> dict[str, Member] | None:
    """Return the files of an archive by name, or None when the file is no archive.

    Args:
        folder: where a compressed tar is unpacked to, into a file without a name.

    Raises `Refusal` for names, kinds and sizes that only an attack or a broken tool makes.
    """
    head = file.read(512)
    file.seek(0)
    if head[:4] in ZIP:
        return _of_zip(file, size)
    if head[:2] == GZIP:
        return _of_tar(_unpacked(file, _gunzip(file), size, folder))
    if head[:4] == ZSTD:
        return _of_tar(_unpacked(file, _unzstd(file), size, folder))
    if head[257:262] == b"ustar":
        return _of_tar(file)
    return None


class _Names:
    """What has been seen, and what may be next."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._count = 0

    def counts(self, name: str) -> bool:
        """Say whether a regular file is worth reading; refuse names that leave the folder, hide something, or come twice."""
        self._count += 1
        if self._count > MAX_ENTRIES:
            raise Refusal("too_large", f"the archive has more than {MAX_ENTRIES} entries", "Split the data set.")
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or ".." in parts or ":" in parts[0] or printable(name) != name:
            raise Refusal("unsafe_file", f"archive entry {name!r} has a name that leaves its folder or hides something", "Use plain relative names.")
        if name.endswith("/") or parts[0] == "__MACOSX" or parts[-1].startswith(".") or parts[-1] == "Thumbs.db":
            return False
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in self._seen:
            raise Refusal("unsafe_file", f"archive entry {name!r} appears twice", "Give every file its own name.")
        self._seen.add(folded)
        return True


def _linked(name: str) -> Refusal:
    return Refusal("unsafe_file", f"archive entry {name!r} is a link or a device", "Archive only regular files.")


def _bomb(size: int, total: int) -> Refusal:
    return Refusal("unsafe_file", f"the archive would grow from {size} to {total} bytes", "Upload it without extreme compression.")


# -- zip -----------------------------------------------------------------------------------------------------------


def _of_zip(file: BinaryIO, size: int) -> dict[str, Member]:
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise damaged(f"the zip archive cannot be read: {error}") from error
    names, found, total = _Names(), {}, 0
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _linked(entry.filename)
        if not names.counts(entry.filename):
            continue
        if entry.flag_bits & 1:
            raise Refusal("unsupported_format", f"archive entry {entry.filename!r} is encrypted", "Upload the archive without a password.")
        total += entry.file_size
        found[entry.filename] = Member(entry.filename, entry.file_size, lambda entry=entry: _zip_pieces(archive, entry))  # type: ignore[misc]
    if total > MAX_RATIO * size + CHUNK:
        raise _bomb(size, total)
    return found


def _zip_pieces(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield a member's bytes, never more than its directory entry claims."""
    left = entry.file_size
    try:
        with archive.open(entry) as member:
            while piece := member.read(CHUNK):
                left -= len(piece)
                if left < 0:
                    raise Refusal("unsafe_file", f"archive entry {entry.filename!r} is larger than it claims", "Archive the files again.")
                yield piece
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, RuntimeError) as error:
        raise damaged(f"archive entry {entry.filename!r} cannot be read: {error}") from error
    except Exception as error:  # zlib, bz2 and lzma each raise their own class
        if isinstance(error, Refusal):
            raise
        raise damaged(f"archive entry {entry.filename!r} cannot be unpacked: {error}") from error


# -- tar -----------------------------------------------------------------------------------------------------------


def _of_tar(file: BinaryIO) -> dict[str, Member]:
    names, found, last = _Names(), {}, 0
    end = file.seek(0, 2)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as archive:
            while (entry := archive.next()) is not None:
                # tarfile keeps every header it has read; two million of them are gigabytes.
                archive.members.clear()  # type: ignore[attr-defined]
                name = entry.name.removeprefix("./")
                last = entry.offset_data + (-(-entry.size // 512) * 512 if entry.isreg() else 0)
                if entry.size < 0:
                    # The next header would lie before this one: some tarfile versions never end then.
                    raise damaged(f"archive entry {name!r} has a negative size")
                if entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse():
                    raise _linked(entry.name)
                if not names.counts(name):
                    continue
                if entry.offset_data + entry.size > end:
                    raise damaged(f"archive entry {name!r} reaches past the end of the file")
                found[name] = Member(name, entry.size, lambda entry=entry: _slice(file, entry.offset_data, entry.size))  # type: ignore[misc]
    except (tarfile.TarError, ValueError, OSError, EOFError, UnicodeDecodeError) as error:
        raise damaged(f"the tar archive cannot be read: {error}") from error
    # Without the mark of its end, an archive that was cut between two files would pass for a smaller one.
    file.seek(last)
    if file.read(512) != b"\0" * 512:
        raise damaged("the tar archive is cut short: its end is missing")
    return found


def _slice(file: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    file.seek(start)
    left = size
    while left:
        piece = file.read(min(CHUNK, left))
        if not piece:
            raise damaged("the archive is cut short")
        left -= len(piece)
        yield piece


def _unpacked(file: BinaryIO, pieces: Iterator[bytes], size: int, folder: Path) -> BinaryIO:
    """Write a decompressed stream into a nameless file and return it."""
    spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  lives as long as the members do
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_RATIO * size + CHUNK:
            raise _bomb(size, total)
        spool.write(piece)
    spool.seek(0)
    if total < 512 or spool.read(262)[257:262] != b"ustar":
        raise Refusal("unsupported_format", "the compressed file holds no tar archive", "Compress a tar archive of the data set, or upload a zip.")
    return spool


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    unpacker: Any = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        while piece := file.read(CHUNK):
            while piece:
                if unpacker.eof:
                    # A gzip file may be several in a row.
                    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
                yield unpacker.decompress(piece, CHUNK)
                piece = unpacker.unconsumed_tail or unpacker.unused_data
        while not unpacker.eof and (rest := unpacker.decompress(b"", CHUNK)):
            yield rest
    except zlib.error as error:
        raise damaged(f"the gzip stream cannot be unpacked: {error}") from error
    if not unpacker.eof:
        raise damaged("the gzip stream is cut short")


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    # Frames may ask for gigabytes of window; 128 MiB is what the zstd command itself takes without being told.
    stream = zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(file, read_across_frames=True)
    try:
        while piece := stream.read(CHUNK):
            yield piece
    except zstandard.ZstdError as error:
        raise damaged(f"the zstd stream cannot be unpacked: {error}") from error

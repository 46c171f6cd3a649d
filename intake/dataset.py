"""Image data sets (a zip of class folders, or .npz) to one uint8 tensor file and a description."""

from __future__ import annotations

import collections
import json
import stat
import unicodedata
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from intake.refusal import Refusal, damaged, printable

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
MAX_ENTRIES = 2_000_000
MAX_PIXELS = 16_000_000
MAX_RATIO = 200
MAX_CLASSES = 100_000
HEADER = 4096
CHUNK = 1 << 20


def take_in(path: Path, folder: Path) -> dict[str, Any]:
    """Read the data set at `path`, write `folder/dataset.safetensors` and `folder/dataset.json`, return what it is.

    Raises `Refusal`.
    """
    with path.open("rb") as file:
        if file.read(4) not in (b"PK\x03\x04", b"PK\x05\x06"):
            raise Refusal(
                "unsupported_format",
                "the file is neither a zip archive nor .npz",
                "Upload a zip with one folder a class, or an .npz with `images` (uint8) and `labels`.",
            )
        try:
            archive = zipfile.ZipFile(file)
            entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeDecodeError) as error:
            raise damaged(f"the zip archive cannot be read: {error}") from error
        members = _members(entries, path.stat().st_size)
        if not members:
            raise Refusal("dataset_invalid", "the archive is empty", "Put one folder a class into it, with images inside.")
        if all(name.endswith(".npy") for name in members):
            described = _arrays(archive, members, folder)
        else:
            described = _class_folders(archive, members, folder)
    (folder / "dataset.json").write_text(json.dumps(described))
    return {name: value for name, value in described.items() if name != "names"}


def _members(entries: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the files that count, by name; refuse names and sizes that only an attack needs."""
    if len(entries) > MAX_ENTRIES:
        raise Refusal("too_large", f"the archive has {len(entries)} entries", f"At most {MAX_ENTRIES} are taken.")
    members: dict[str, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    total = 0
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or ":" in name.split("/")[0] or printable(name) != name:
            raise Refusal("unsafe_file", f"archive entry {name!r} has a name that leaves its folder or hides something", "Use plain relative names.")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise Refusal("unsafe_file", f"archive entry {name!r} is a link or a device", "Archive only regular files.")
        if entry.is_dir() or name.startswith("__MACOSX/") or name.rsplit("/", 1)[-1].startswith(".") or name.endswith("Thumbs.db"):
            continue
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            raise Refusal("unsafe_file", f"archive entry {name!r} appears twice", "Give every file its own name.")
        seen.add(folded)
        if entry.flag_bits & 1:
            raise Refusal("unsupported_format", f"archive entry {name!r} is encrypted", "Upload the archive without a password.")
        total += entry.file_size
        members[name] = entry
    if total > MAX_RATIO * size + CHUNK:
        raise Refusal("unsafe_file", f"the archive would grow from {size} to {total} bytes", "Upload it without extreme compression.")
    return members


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
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


# -- class folders -------------------------------------------------------------------------------------------------


def _class_folders(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], folder: Path) -> dict[str, Any]:
    """Decode CLASS/NAME images; a common top folder is dropped; class folders in alphabetical order are the labels."""
    images = {name: name.split("/") for name in members if "." + name.rsplit(".", 1)[-1].lower() in ENDINGS}
    while len({parts[0] for parts in images.values()}) == 1 and all(len(parts) > 2 for parts in images.values()):
        images = {name: parts[1:] for name, parts in images.items()}
    if not images:
        raise Refusal("dataset_invalid", f"none of the {len(members)} files is an image", f"Use one folder a class with {', '.join(sorted(ENDINGS))} files.")
    stray = [name for name, parts in images.items() if len(parts) != 2]
    if stray:
        raise Refusal("dataset_invalid", f"{stray[0]!r} is not in a class folder ({len(stray)} such files)", "Use CLASS/IMAGE paths, one folder a class.")
    classes = sorted({parts[0] for parts in images.values()})
    ordered = sorted(images, key=lambda name: images[name])
    writer = _Writer(folder, pictures=True)
    names, labels, unreadable, sizes = [], [], [], collections.Counter[tuple[int, ...]]()
    for name in ordered:
        data = b"".join(_read(archive, members[name]))
        try:
            array = _decode(data)
        except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError, IndexError, KeyError) as error:
            unreadable.append({"name": name, "reason": printable(str(error))[:200]})
            continue
        sizes[array.shape[:2]] += 1
        if len(sizes) > 1:
            raise Refusal(
                "dataset_invalid",
                f"the images differ in size: {' and '.join(f'{h}x{w}' for h, w in sizes)} (at {name!r})",
                "Resize all images to the model's input size.",
            )
        writer.add(array)
        names.append(name)
        labels.append(classes.index(images[name][0]))
    if not names:
        raise Refusal("dataset_invalid", f"none of {len(images)} images can be read; the first: {unreadable[0]['reason']}", "Check the files.")
    shape = writer.finish(np.asarray(labels, dtype="<i8"))
    ignored = sorted(set(members) - set(images))[:20]
    return _describe("class_folders", shape, labels, classes, names) | {"unreadable": unreadable, "ignored": ignored}


def _decode(data: bytes) -> np.ndarray:
    """Return an image as (H, W, 3) uint8, upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(_buffer(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} are taken")
            if min(image.size) < 1:
                raise ValueError("no pixels")
            upright = image if image.format in ("PNG", "WEBP", "BMP", "PPM", "GIF") else ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))


def _buffer(data: bytes) -> BinaryIO:
    import io

    return io.BytesIO(data)


# -- arrays --------------------------------------------------------------------------------------------------------


def _arrays(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], folder: Path) -> dict[str, Any]:
    """Read `images` and `labels` of an .npz; headers are checked before any data is read."""
    found = {name.removesuffix(".npy"): entry for name, entry in members.items()}
    image_key = next((key for key in ("images", "x", "X", "data", "arr_0") if key in found), None)
    label_key = next((key for key in ("labels", "y", "Y", "targets", "arr_1") if key in found), None)
    if image_key is None:
        raise Refusal("dataset_invalid", f"the .npz holds {sorted(found)[:10]} but no `images`", "Call the arrays `images` and `labels`.")
    shape, dtype, stream = _header(archive, found[image_key])
    if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape[1:]:
        raise Refusal("dataset_invalid", f"`{image_key}` is {dtype} {shape}", "Give uint8 images of shape (N, H, W, C), (N, C, H, W) or (N, H, W).")
    if not shape[0]:
        raise Refusal("dataset_invalid", "the data set is empty", "Give at least one image.")
    if len(shape) == 3:
        shape = (*shape, 1)
    channels_first = shape[3] not in (1, 3) and shape[1] in (1, 3)
    if not channels_first and shape[3] not in (1, 3):
        raise Refusal(
            "dataset_invalid", f"`{image_key}` has shape {shape}: neither the last nor the second size is 1 or 3 channels", "Give grey or RGB images."
        )
    labels, names = None, []
    if label_key is not None:
        labels = _small_array(archive, found[label_key], label_key)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != shape[0]:
            raise Refusal("dataset_invalid", f"`{label_key}` is {labels.dtype} {labels.shape} for {shape[0]} images", "Give one integer a image.")
        if labels.min() < 0 or labels.max() >= MAX_CLASSES:
            raise Refusal("dataset_invalid", f"labels run from {labels.min()} to {labels.max()}", "Use class indices 0, 1, 2, ….")
        labels = labels.astype("<i8")
    if "class_names" in found:
        array = _small_array(archive, found["class_names"], "class_names")
        if array.ndim != 1 or array.dtype.kind != "U":
            raise Refusal("dataset_invalid", "`class_names` is not a list of strings", "Give an array of unicode strings.")
        names = [printable(str(name)) for name in array]
    if labels is not None and names and labels.max() >= len(names):
        raise Refusal("dataset_invalid", f"label {labels.max()} has no name among {len(names)}", "Give one class name a label.")
    writer = _Writer(folder, pictures=False)
    row = int(np.prod(shape[1:]))
    rows = max(CHUNK // row, 1)
    for piece in _exactly(stream, shape[0] * row, rows * row):
        block = np.frombuffer(piece, dtype=np.uint8).reshape(-1, *shape[1:])
        writer.add_many(np.ascontiguousarray(block.transpose(0, 2, 3, 1)) if channels_first else block)
    final = writer.finish(labels)
    described = _describe("npz", final, [] if labels is None else labels.tolist(), names, [])
    return described | {"labelled": labels is not None, "unreadable": [], "ignored": []}


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any], Iterator[bytes]]:
    """Return an .npy member's shape and dtype, and the stream of the bytes after its header."""
    import io

    stream = _read(archive, entry)
    head = io.BytesIO(next(stream, b""))
    try:
        version = np.lib.format.read_magic(head)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(head)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise damaged(f"{entry.filename} is not an array: {error}") from error
    if dtype.hasobject or dtype.fields is not None:
        raise Refusal("unsafe_file", f"{entry.filename} holds Python objects", "Save plain numeric arrays.")
    if fortran and len(shape) > 1:
        raise Refusal("dataset_invalid", f"{entry.filename} is in Fortran order", "Save np.ascontiguousarray(…).")
    if any(size < 0 for size in shape) or int(np.prod([int(s) for s in shape], dtype=object)) * dtype.itemsize != entry.file_size - head.tell():
        raise damaged(f"{entry.filename} claims shape {shape} of {dtype} but has {entry.file_size} bytes")

    def rest() -> Iterator[bytes]:
        yield head.read()
        yield from stream

    return shape, dtype, rest()


def _small_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> np.ndarray:
    if entry.file_size > 64 << 20:
        raise Refusal("too_large", f"`{name}` has {entry.file_size} bytes", "At most 64 MiB are taken.")
    shape, dtype, stream = _header(archive, entry)
    return np.frombuffer(b"".join(stream), dtype=dtype).reshape(shape)


def _exactly(stream: Iterator[bytes], total: int, size: int) -> Iterator[bytes]:
    """Regroup a stream into pieces of `size` bytes; the last may be shorter."""
    waiting = bytearray()
    given = 0
    for piece in stream:
        waiting += piece
        while len(waiting) >= size:
            yield bytes(waiting[:size])
            del waiting[:size]
            given += size
    if given + len(waiting) != total:
        raise damaged(f"the images end after {given + len(waiting)} of {total} bytes")
    if waiting:
        yield bytes(waiting)


# -- writing -------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes (N, H, W, C) uint8 images and labels as safetensors whose header is filled in at the end."""

    def __init__(self, folder: Path, *, pictures: bool) -> None:
        self._path = folder / "dataset.safetensors"
        self._file = self._path.open("w+b")
        self._file.write(b"\0" * (8 + HEADER))
        self._shape: tuple[int, ...] = ()
        self._count = 0
        # Arrays say how many channels they have; decoded pictures are RGB until all prove grey.
        self._grey = pictures

    def add(self, image: np.ndarray) -> None:
        """Append one (H, W, 3) image."""
        self._grey = self._grey and bool((image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all())
        self.add_many(image[None])

    def add_many(self, images: np.ndarray) -> None:
        """Append (N, H, W, C) images."""
        self._shape = images.shape[1:]
        self._count += len(images)
        self._file.write(images.tobytes())

    def finish(self, labels: np.ndarray | None) -> tuple[int, ...]:
        """Write labels and header; return the final (N, H, W, C). Pictures that are all grey keep one channel."""
        if self._shape[-1] == 3 and self._grey and self._count:
            self._drop_colour()
        shape = (self._count, *self._shape)
        size = int(np.prod(shape))
        header: dict[str, Any] = {"images": {"dtype": "U8", "shape": list(shape), "data_offsets": [0, size]}}
        self._file.seek(8 + HEADER + size)
        self._file.truncate()
        if labels is not None:
            # safetensors wants 8-byte items anywhere; only the order and the absence of holes matter.
            header["labels"] = {"dtype": "I64", "shape": [len(labels)], "data_offsets": [size, size + labels.nbytes]}
            self._file.write(labels.tobytes())
        text = json.dumps(header).encode().ljust(HEADER)
        self._file.seek(0)
        self._file.write(HEADER.to_bytes(8, "little") + text)
        self._file.close()
        return shape

    def _drop_colour(self) -> None:
        row = int(np.prod(self._shape))
        rows = max(CHUNK // row, 1)
        for start in range(0, self._count, rows):
            count = min(rows, self._count - start)
            self._file.seek(8 + HEADER + start * row)
            grey = np.frombuffer(self._file.read(count * row), dtype=np.uint8)[::3].tobytes()
            self._file.seek(8 + HEADER + start * row // 3)
            self._file.write(grey)
        self._shape = (*self._shape[:2], 1)


def _describe(layout: str, shape: tuple[int, ...], labels: list[int], classes: list[str], names: list[str]) -> dict[str, Any]:
    counts = collections.Counter(labels)
    total = max(len(classes), max(counts, default=-1) + 1)
    return {
        "layout": layout,
        "count": shape[0],
        "height": shape[1],
        "width": shape[2],
        "channels": shape[3],
        "labelled": bool(labels),
        "class_names": classes,
        "per_class": [counts.get(label, 0) for label in range(total)],
        "names": names,
    }

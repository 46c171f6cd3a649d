"""Tables of images: .npz, CIFAR's pickled batches, parquet, and CSV files of labels."""

from __future__ import annotations

import collections
import csv
import io
import json
import os
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from intake.archive import MAX_RATIO, Member
from intake.pictures import CHUNK
from intake.refusal import Refusal, damaged, printable
from intake.unpickling import Interpreter, Recorded, Storage

MAX_CLASSES = 100_000
MAX_TABLE = 256 << 20
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path", "image_id", "id", "name")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category", "label_name")


# -- .npz ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays:
    """An .npz whose headers have been checked.

    Attributes:
        shape: (N, H, W, C).
        blocks: yields (n, H, W, C) uint8 pieces.
    """

    shape: tuple[int, ...]
    labels: np.ndarray | None
    class_names: list[str]
    blocks: Iterator[np.ndarray]


def npz(members: dict[str, Member]) -> Arrays:
    """Read `images`, `labels` and `class_names` of an .npz; headers are checked before any data is read."""
    found = {name.removesuffix(".npy"): member for name, member in members.items()}
    image_key = next((key for key in ("images", "x", "X", "data", "arr_0") if key in found), None)
    wanted = label_key(members)
    if image_key is None:
        raise Refusal("dataset_invalid", f"the .npz holds {sorted(found)[:10]} but no `images`", "Call the arrays `images` and `labels`.")
    shape, dtype, stream = _header(found[image_key])
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
    if wanted is not None:
        labels = _small_array(found[wanted], wanted)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != shape[0]:
            raise Refusal("dataset_invalid", f"`{wanted}` is {labels.dtype} {labels.shape} for {shape[0]} images", "Give one integer an image.")
        labels = checked_labels(labels)
    if "class_names" in found:
        array = _small_array(found["class_names"], "class_names")
        if array.ndim != 1 or array.dtype.kind != "U":
            raise Refusal("dataset_invalid", "`class_names` is not a list of strings", "Give an array of unicode strings.")
        names = [printable(str(name)) for name in array]
    if labels is not None and names and labels.max() >= len(names):
        raise Refusal("dataset_invalid", f"label {labels.max()} has no name among {len(names)}", "Give one class name a label.")
    return Arrays(shape, labels, names, _blocks(stream, shape, channels_first=channels_first))


def label_key(members: dict[str, Member]) -> str | None:
    """Return the name of an .npz file's array of labels, if it has one."""
    return next((key for key in ("labels", "y", "Y", "targets", "arr_1") if f"{key}.npy" in members), None)


def rows_of(member: Member) -> tuple[tuple[int, ...], np.dtype[Any], Iterator[np.ndarray]]:
    """Return an .npy member's shape and dtype, and its rows in blocks.

    Raises `Refusal`.
    """
    shape, dtype, stream = _header(member)
    row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize

    def blocks() -> Iterator[np.ndarray]:
        for piece in _exactly(stream, shape[0] * row, max(CHUNK // max(row, 1), 1) * row):
            yield np.frombuffer(piece, dtype=dtype).reshape(-1, *shape[1:])

    return shape, dtype, blocks()


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Return the header of an .npy file."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return out.getvalue()


def checked_labels(labels: np.ndarray) -> np.ndarray:
    """Return integer labels as little-endian int64; refuse negative and absurd ones."""
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise Refusal("dataset_invalid", f"labels run from {labels.min()} to {labels.max()}", "Use class indices 0, 1, 2, ….")
    return labels.astype("<i8")


def _blocks(stream: Iterator[bytes], shape: tuple[int, ...], *, channels_first: bool) -> Iterator[np.ndarray]:
    row = int(np.prod(shape[1:]))
    for piece in _exactly(stream, shape[0] * row, max(CHUNK // row, 1) * row):
        block = np.frombuffer(piece, dtype=np.uint8).reshape(-1, *shape[1:])
        yield np.ascontiguousarray(block.transpose(0, 2, 3, 1)) if channels_first else block


def _header(member: Member) -> tuple[tuple[int, ...], np.dtype[Any], Iterator[bytes]]:
    """Return an .npy member's shape and dtype, and the stream of the bytes after its header."""
    stream = member.pieces()
    head = io.BytesIO(next(stream, b""))
    try:
        version = np.lib.format.read_magic(head)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(head)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise damaged(f"{member.name} is not an array: its header cannot be read") from error
    if dtype.hasobject or dtype.fields is not None:
        raise Refusal("unsafe_file", f"{member.name} holds Python objects", "Save plain numeric arrays.")
    if fortran and len(shape) > 1:
        raise Refusal("dataset_invalid", f"{member.name} is in Fortran order", "Save np.ascontiguousarray(…).")
    if any(size < 0 for size in shape) or int(np.prod([int(s) for s in shape], dtype=object)) * dtype.itemsize != member.size - head.tell():
        raise damaged(f"{member.name} claims shape {shape} of {dtype} but has {member.size} bytes")

    def rest() -> Iterator[bytes]:
        yield head.read()
        yield from stream

    return shape, dtype, rest()


def _small_array(member: Member, name: str) -> np.ndarray:
    if member.size > 64 << 20:
        raise Refusal("too_large", f"`{name}` has {member.size} bytes", "At most 64 MiB are taken.")
    shape, dtype, stream = _header(member)
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


# -- CIFAR's batches -----------------------------------------------------------------------------------------------

# Training batches, test batches, names: of CIFAR-10 and of CIFAR-100.
CIFAR = ({*(f"data_batch_{number}" for number in range(1, 6)), "train"}, {"test_batch", "test"}, {"batches.meta", "meta"})


def is_cifar(members: dict[str, Member]) -> bool:
    """Say whether an archive holds the batches of the CIFAR python archives."""
    names = {name.rsplit("/", 1)[-1] for name in members}
    return bool(names & (CIFAR[0] | CIFAR[1])) and names <= CIFAR[0] | CIFAR[1] | CIFAR[2] | {"readme.html", "file.txt~"}


def cifar(members: dict[str, Member]) -> tuple[np.ndarray, np.ndarray, list[str], list[str], list[str]]:
    """Return images (N, 32, 32, 3), labels, class names, image names and the batches left out.

    The training batches in order; the test batch only when there is nothing else. Pickles are interpreted, never loaded.
    """
    by_name = {name.rsplit("/", 1)[-1]: member for name, member in sorted(members.items())}
    batches = [name for name in by_name if name in CIFAR[0]] or [name for name in by_name if name in CIFAR[1]]
    images, labels, names = [], [], []
    for name in batches:
        content, pixels, wanted = cifar_batch(by_name[name])
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += content[wanted]
        files = content.get("filenames", [str(number) for number in range(len(pixels))])
        if not _all_text(files) or len(files) != len(pixels):
            raise damaged(f"{name} has no list of {len(pixels)} file names under `filenames`")
        names += [printable(f"{name}/{_text(file)}") for file in files]
    found = checked_labels(np.asarray(labels, dtype="<i8"))
    classes: list[str] = []
    for name in CIFAR[2] & set(by_name):
        content = _plain_pickle(by_name[name])
        listed = content.get("fine_label_names", content.get("label_names"))
        if not _all_text(listed):
            raise damaged(f"{name} has no list of class names")
        classes = [printable(_text(one)) for one in listed]
    if classes and found.max() >= len(classes):
        raise damaged(f"label {found.max()} has no name among {len(classes)}")
    return np.concatenate(images), found, classes, names, [name for name in by_name if name not in batches and name not in CIFAR[2]]


def cifar_batch(member: Member) -> tuple[dict[str, Any], np.ndarray, str]:
    """Return a batch's content, its pixels (N, 3072), and under which key the content has its labels.

    Raises `Refusal`.
    """
    name = member.name.rsplit("/", 1)[-1]
    content = _plain_pickle(member)
    wanted = next((key for key in ("fine_labels", "labels") if key in content), None)
    pixels = _array(content.get("data"), name)
    if wanted is None or not isinstance(content[wanted], list) or any(type(label) is not int for label in content[wanted]):
        raise damaged(f"{name} has no list of labels")
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or len(pixels) != len(content[wanted]):
        raise damaged(f"{name} has data of shape {pixels.shape} for {len(content[wanted])} labels")
    return content, pixels, wanted


def _plain_pickle(member: Member) -> dict[str, Any]:
    if member.size > MAX_TABLE:
        raise Refusal("too_large", f"{member.name} has {member.size} bytes", "Upload CIFAR's own batches.")

    def none(identity: Any) -> Storage:
        raise damaged(f"{member.name} speaks of a storage")

    content = Interpreter(none, record=True).load(io.BytesIO(member.read()))
    if not isinstance(content, dict):
        raise damaged(f"{member.name} holds a {type(content).__name__}, not a batch")
    return {_text(key): value for key, value in content.items()}


def _all_text(value: Any) -> TypeGuard[list[str | bytes]]:
    """Say whether it is a list of names; anything nested could take for ever to write out."""
    return isinstance(value, list) and all(isinstance(one, (str, bytes)) for one in value)


def _text(value: Any) -> str:
    """Return a name that Python 2 or 3 may have written as bytes."""
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _array(value: Any, name: str) -> np.ndarray:
    """Return the uint8 array that a recorded numpy reconstruction describes: (version, shape, dtype, fortran, bytes)."""
    state = value.state if isinstance(value, Recorded) and value.kind.endswith("multiarray._reconstruct") else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise damaged(f"{name} has no array of pixels")
    _, shape, dtype, fortran, raw = state
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    kind = dtype.arguments[0] if isinstance(dtype, Recorded) and dtype.kind == "numpy.dtype" and dtype.arguments else None
    if kind not in ("u1", "|u1") or not isinstance(raw, bytes) or not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise damaged(f"{name} has an array that is not of bytes")
    if int(np.prod([int(size) for size in shape], dtype=object)) != len(raw):
        raise damaged(f"{name} claims shape {shape} for {len(raw)} bytes")
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


# -- parquet -------------------------------------------------------------------------------------------------------


def parquet(path: Path) -> tuple[list[str], Iterator[tuple[str, bytes, int | str | None]]]:
    """Return the class names (if the schema has them) and yield (name, picture, label) of a parquet file.

    As Hugging Face writes it: a column of pictures as bytes or as struct{bytes, path}, and a column of labels. Raises `Refusal`.
    """
    pyarrow, file, label, picture = _checked_parquet(path)
    most = MAX_RATIO * path.stat().st_size + CHUNK

    def rows() -> Iterator[tuple[str, bytes, int | str | None]]:
        columns = [picture] + ([label] if label else [])
        count = total = 0
        try:
            for batch in file.iter_batches(batch_size=64, columns=columns, use_threads=False):
                labels = batch.column(label).to_pylist() if label else [None] * batch.num_rows
                for cell, one in zip(batch.column(picture), labels, strict=True):
                    value = cell.as_py()
                    data = (value.get("bytes") if isinstance(value, dict) else value) or b""
                    name = (value.get("path") if isinstance(value, dict) else None) or f"row-{count}"
                    total += len(data)
                    if total > most:
                        raise Refusal("unsafe_file", f"the parquet file would grow to more than {most} bytes", "Write every picture once.")
                    yield printable(str(name))[:500], data, one
                    count += 1
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise damaged(f"the parquet file cannot be read after row {count}: {printable(str(error))[:200]}") from error

    return _hugging_face_names(file.schema_arrow.metadata, label), rows()


def open_parquet(path: Path) -> tuple[Any, Any, str | None]:
    """Return pyarrow, an open parquet file with pictures, and the column of its labels, if it has one.

    Raises `Refusal`.
    """
    pyarrow, _, label, _ = _checked_parquet(path)
    # As it is written, without the dictionaries that reading pictures wants.
    return pyarrow, _open_parquet(pyarrow, path), label


def _checked_parquet(path: Path) -> tuple[Any, Any, str | None, str]:
    try:
        # Arrow's own allocators reserve more address space than the fence allows.
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        advice = "Upload a zip of class folders, or ask the operator to install unpoison[parquet]."
        raise Refusal("unsupported_format", "this server does not read parquet", advice) from error
    try:
        schema = _open_parquet(pyarrow, path).schema_arrow
        picture = next((field for field in schema if _holds_pictures(pyarrow, field.type)), None)
        label = next((name for name in ("label", "labels", "fine_label", "target", "class") if name in schema.names), None)
        if picture is None:
            advice = "Give a column `image` of bytes, or of struct{bytes, path}."
            raise Refusal("dataset_invalid", f"none of the columns {schema.names[:12]} holds pictures", advice)
        if len(set(schema.names)) != len(schema.names):
            raise Refusal("dataset_invalid", f"two of the columns {schema.names[:12]} have one name", "Give every column a name of its own.")
        # A dictionary says a value once for many rows: it stays one value until a row is looked at.
        leaf = f"{picture.name}.bytes" if pyarrow.types.is_struct(picture.type) else picture.name
        file = _open_parquet(pyarrow, path, read_dictionary=[leaf])
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise damaged(f"the parquet file cannot be read: {printable(str(error))[:200]}") from error
    return pyarrow, file, label, picture.name


def _open_parquet(pyarrow: Any, path: Path, **more: Any) -> Any:
    return pyarrow.parquet.ParquetFile(path, memory_map=True, thrift_string_size_limit=64 << 20, thrift_container_size_limit=1_000_000, **more)


def _holds_pictures(pyarrow: Any, kind: Any) -> bool:
    binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    if pyarrow.types.is_struct(kind):
        return any(field.name == "bytes" and any(is_kind(field.type) for is_kind in binary) for field in kind)
    return any(is_kind(kind) for is_kind in binary)


def _hugging_face_names(metadata: dict[bytes, bytes] | None, label: str | None) -> list[str]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [printable(str(name)) for name in features[label]["names"]]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []


# -- CSV -----------------------------------------------------------------------------------------------------------


def csv_rows(member: Member) -> tuple[list[list[str]], int, int, str]:
    """Return a CSV's rows with its header, the columns of file names and labels, and its delimiter.

    Raises `Refusal`.
    """
    if member.size > MAX_TABLE:
        raise Refusal("too_large", f"{member.name} has {member.size} bytes", f"At most {MAX_TABLE >> 20} MiB are taken.")
    try:
        text = member.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal("dataset_invalid", f"{member.name} is not UTF-8 text", "Save the CSV as UTF-8.") from error
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise damaged(f"{member.name} cannot be read: {error}") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    file, label = (next((header.index(name) for name in known if name in header), None) for known in (FILE_COLUMNS, LABEL_COLUMNS))
    if file is None or label is None:
        raise Refusal(
            "dataset_invalid",
            f"{member.name} has the columns {header[:12]}: which is the file's name, which the label?",
            f"Start it with a line that names them, e.g. `{FILE_COLUMNS[0]},{LABEL_COLUMNS[0]}`.",
        )
    return rows, file, label, delimiter


def csv_labels(member: Member) -> dict[str, str]:
    """Return the label of every file that a CSV names; its header says which columns these are."""
    rows, file, label, _ = csv_rows(member)
    found: dict[str, str] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) <= max(file, label):
            raise Refusal("dataset_invalid", f"line {number} of {member.name} has {len(row)} columns", "Give every line the columns of the first.")
        name, value = row[file].strip(), row[label].strip()
        if not value or value[0] in "=+-@" or printable(value) != value:
            raise Refusal("unsafe_file", f"line {number} of {member.name} has the label {value!r}", "Labels are plain words or numbers.")
        if found.setdefault(name, value) != value:
            raise Refusal("dataset_invalid", f"{member.name} gives {name!r} two labels", "Give every file one label.")
    return found


def match(labels: dict[str, str], pictures: list[str], table: str, *, partly: bool = False) -> dict[str, str]:
    """Return the label of every picture: by path, by its end, or by the name without ending, whichever the CSV uses.

    Raises `Refusal` when a name fits no picture (unless `partly`) or several.
    """
    for shorten in (lambda name: name, lambda name: name.rsplit("/", 1)[-1], lambda name: name.rsplit("/", 1)[-1].rsplit(".", 1)[0]):
        by_name: dict[str, list[str]] = collections.defaultdict(list)
        for name in pictures:
            by_name[shorten(name)].append(name)
        hits = labels.keys() & by_name.keys()
        if not hits:
            continue
        twice = next((name for name in sorted(hits) if len(by_name[name]) > 1), None)
        if twice is not None:
            raise Refusal("dataset_invalid", f"{twice!r} of {table} is {len(by_name[twice])} files: {by_name[twice][:3]}", "Write paths into the CSV.")
        missing = sorted(labels.keys() - hits)
        if missing and not partly:
            raise Refusal(
                "dataset_invalid", f"{len(missing)} files of {table} are not in the archive, the first is {missing[0]!r}", "Add them, or drop the lines."
            )
        return {by_name[name][0]: labels[name] for name in hits}
    raise Refusal("dataset_invalid", f"no file of {table} is in the archive", "Give the files' names as they are in the archive.")

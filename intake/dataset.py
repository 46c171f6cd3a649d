"""Image data sets of any known layout to one uint8 tensor file and a description."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from intake import archive, pictures, tables
from intake.archive import Member
from intake.pictures import Writer
from intake.refusal import Refusal, printable

ORDER = "classes.txt"
SPLITS = {"train", "test", "val", "valid", "validation"}
PARQUET = b"PAR1"
NESTED = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".7z", ".rar")
LAYOUTS = (
    "Upload a zip or tar (.gz, .zst) of one folder a class, of pictures with a CSV of labels, of a WebDataset shard or of CIFAR's batches; "
    "or a parquet file with pictures; or an .npz with `images` (uint8) and `labels`."
)


def take_in(path: Path, folder: Path, side: int | None = None) -> dict[str, Any]:
    """Read the data set at `path`, write `folder/dataset.safetensors` and `folder/dataset.json`, return what it is.

    With `side`, every picture becomes a square of that many pixels; see `pictures.decode`.

    Raises `Refusal`.
    """
    with path.open("rb") as file:
        if file.read(4) == PARQUET:
            described = _parquet([path], folder, side)
        else:
            file.seek(0)
            members = archive.members(file, path.stat().st_size, folder)
            if members is None:
                raise Refusal("unsupported_format", "the file is neither a zip archive nor .npz, nor another layout of a data set", LAYOUTS)
            described = _of_archive(members, folder, side)
    (folder / "dataset.json").write_text(json.dumps(described))
    return {name: value for name, value in described.items() if name != "names"}


def _of_archive(members: dict[str, Member], folder: Path, side: int | None) -> dict[str, Any]:
    """Tell the layout from the members' names and read it."""
    if not members:
        raise Refusal("dataset_invalid", "the archive is empty", "Put one folder a class into it, with images inside.")
    arrays = _npz if all(name.endswith(".npy") for name in members) else _cifar if tables.is_cifar(members) else None
    if arrays is not None:
        if side is not None:
            raise Refusal("dataset_invalid", "arrays are not resized, only pictures are", "Leave `resize` out, or upload pictures.")
        return arrays(members, folder)
    shards = sorted(name for name in members if name.endswith(".parquet"))
    if shards:
        return _parquet_shards([members[name] for name in shards], folder, side)
    images = sorted(name for name in members if pictures.is_picture(name))
    if not images:
        inner = next((name for name in sorted(members) if name.lower().endswith(NESTED)), None)
        if inner is not None:
            raise Refusal("unsafe_file", f"the archive holds another archive, {inner!r}", "Upload the inner archive itself.")
        endings = ", ".join(sorted(pictures.ENDINGS))
        raise Refusal("dataset_invalid", f"none of the {len(members)} files is an image", f"Use one folder a class with {endings} files.")
    shared = _common_top(images)
    csv_files = [name for name in members if name.lower().endswith((".csv", ".tsv"))]
    notes = annotated(members)
    if len(csv_files) == 1:
        found = tables.match(tables.csv_labels(members[csv_files[0]]), images, csv_files[0])
        layout, kept = "csv", sorted(found)
        labels: list[Any] = [found[name] for name in kept]
    elif len(csv_files) > 1:
        raise Refusal("dataset_invalid", f"the archive has {len(csv_files)} CSV files: {sorted(csv_files)[:4]}", "Leave the one with the labels.")
    elif notes and all(name.rsplit(".", 1)[0] in notes for name in images):
        layout, kept = "webdataset", images
        labels = [_annotation(members[notes[name.rsplit(".", 1)[0]]]) for name in images]
    else:
        depths = {len(name.split("/")) - shared for name in images}
        if depths == {1}:
            layout, kept, labels = "flat", images, [None] * len(images)
        elif depths != {2}:
            splits = {name.split("/")[shared] for name in images} if depths == {3} else set()
            if splits and splits <= SPLITS:
                raise Refusal("dataset_invalid", f"the archive holds {len(splits)} sets: {sorted(splits)}", "Upload each of them as a data set of its own.")
            stray = [name for name in images if len(name.split("/")) - shared != 2]
            raise Refusal("dataset_invalid", f"{stray[0]!r} is not in a class folder ({len(stray)} such files)", "Use CLASS/IMAGE paths, one folder a class.")
        else:
            layout, labels = "class_folders", [name.split("/")[shared] for name in images]
            kept = [name for _, name in sorted(zip(labels, images, strict=True))]
            labels = sorted(labels)
    order = next((members[name] for name in members if name.rsplit("/", 1)[-1] == ORDER), None)
    given = _listed(order) if order is not None else []
    unused = sorted(set(members) - set(kept) - set(csv_files) - set(notes.values()) - ({order.name} if order else set()))
    rows = ((name, members[name].read, label) for name, label in zip(kept, labels, strict=True))
    return _collect(layout, rows, folder, given, side) | {"ignored": unused[:20]}


def annotated(members: dict[str, Member]) -> dict[str, str]:
    """Return the files that give a WebDataset's labels, by the key of their sample."""
    return {name.rsplit(".", 1)[0]: name for name in members if name.endswith((".cls", ".json"))}


def _common_top(names: list[str]) -> int:
    """Return how many top folders all names share that are no class folders: two levels must be left below them."""
    parts = [name.split("/") for name in names]
    shared = 0
    while all(len(one) > shared + 2 for one in parts) and len({one[shared] for one in parts}) == 1:
        shared += 1
    return shared


def _annotation(member: Member) -> Any:
    """Return the label that a WebDataset sample's .cls or .json gives."""
    if member.size > 1 << 20:
        raise Refusal("too_large", f"{member.name} has {member.size} bytes", "A sample's label is short.")
    text = member.read().decode("utf-8", "replace").strip()
    if member.name.endswith(".cls"):
        return text
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal("dataset_invalid", f"{member.name} is not JSON: {error}", "Give a label a sample.") from error
    value = next((content[key] for key in tables.LABEL_COLUMNS if key in content), None) if isinstance(content, dict) else content
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        raise Refusal("dataset_invalid", f"{member.name} has no label", f"Give one of {', '.join(tables.LABEL_COLUMNS)}.")
    return value


def _listed(member: Member) -> list[str]:
    """Return the class names of `classes.txt`, one a line, in the order of the labels."""
    if member.size > 16 << 20:
        raise Refusal("too_large", f"{member.name} has {member.size} bytes", "Give one class name a line.")
    names = [line.strip() for line in member.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if len(set(names)) != len(names) or not names:
        raise Refusal("dataset_invalid", f"{member.name} is empty or names a class twice", "Give one class name a line.")
    return [printable(name) for name in names]


def _numbered(labels: list[Any], given: list[str]) -> tuple[list[int] | None, list[str]]:
    """Return class indices and class names of labels as they were found: indices, names, or none at all.

    Names are numbered in the order of `given`, or alphabetically.
    """
    if all(label is None for label in labels):
        return None, given
    if any(label is None for label in labels):
        raise Refusal("dataset_invalid", f"{sum(label is None for label in labels)} of {len(labels)} images have no label", "Label all images, or none.")
    if all(isinstance(label, int) or (isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10) for label in labels):
        numbers = tables.checked_labels(np.asarray([int(label) for label in labels])).tolist()
        if given and max(numbers) >= len(given):
            raise Refusal("dataset_invalid", f"label {max(numbers)} has no name among {len(given)}", "Give one class name a label.")
        return numbers, given
    names = [printable(str(label)) for label in labels]
    classes = given or sorted(set(names))
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise Refusal("dataset_invalid", f"class {unknown[0]!r} is not in {ORDER}", f"List every class in {ORDER}, or leave it out.")
    index = {name: number for number, name in enumerate(classes)}
    return [index[name] for name in names], classes


def _collect(layout: str, rows: Iterable[tuple[str, Callable[[], bytes], Any]], folder: Path, given: list[str], side: int | None) -> dict[str, Any]:
    """Decode pictures one by one into the tensor file; unreadable ones are listed, equal ones counted."""
    writer = Writer(folder, pictures=True)
    names: list[str] = []
    labels: list[Any] = []
    unreadable: list[dict[str, Any]] = []
    sizes = collections.Counter[tuple[int, ...]]()
    # Class folders keep their meaning when all of one folder's pictures are unreadable.
    found: list[Any] = []
    for position, (name, read, label) in enumerate(rows):
        found.append(label)
        try:
            array = pictures.decode(read(), side)
        except pictures.UNREADABLE as error:
            unreadable.append({"name": name, "position": position, "reason": printable(str(error))[:200]})
            continue
        sizes[array.shape[:2]] += 1
        if len(sizes) > 1:
            raise Refusal(
                "dataset_invalid",
                f"the images differ in size: {' and '.join(f'{h}x{w}' for h, w in sizes)} (at {name!r})",
                "Upload it with `resize` and the model's input size (the middle square of each, scaled), or resize the images yourself.",
            )
        writer.add(array)
        names.append(name)
        labels.append(label)
    if not names:
        total = len(unreadable)
        reason = f"; the first: {unreadable[0]['reason']}" if unreadable else ""
        raise Refusal("dataset_invalid", f"none of {total} images can be read{reason}", "Check the files.")
    # A folder is a class by its name, also if that is a number; elsewhere numbers are class indices.
    if layout == "class_folders" and not given:
        given = sorted({str(label) for label in found})
    if layout == "class_folders":
        index = {name: number for number, name in enumerate(given)}
        unknown = sorted({str(label) for label in found} - set(index))
        if unknown:
            raise Refusal("dataset_invalid", f"class {unknown[0]!r} is not in {ORDER}", f"List every class in {ORDER}, or leave it out.")
        numbers: list[int] | None = [index[str(label)] for label in labels]
        classes = given
    else:
        numbers, classes = _numbered(labels, given)
    shape = writer.finish(None if numbers is None else np.asarray(numbers, dtype="<i8"))
    return _describe(layout, shape, numbers, classes, names, writer) | {"unreadable": unreadable, "resized": side}


def _npz(members: dict[str, Member], folder: Path) -> dict[str, Any]:
    found = tables.npz(members)
    writer = Writer(folder, pictures=False)
    for block in found.blocks:
        writer.add_many(block)
    shape = writer.finish(found.labels)
    numbers = None if found.labels is None else found.labels.tolist()
    return _describe("npz", shape, numbers, found.class_names, [], writer)


def _cifar(members: dict[str, Member], folder: Path) -> dict[str, Any]:
    images, labels, classes, names, unused = tables.cifar(members)
    writer = Writer(folder, pictures=False)
    writer.add_many(images)
    return _describe("cifar", writer.finish(labels), labels.tolist(), classes, names, writer) | {"ignored": unused}


def _parquet_shards(members: list[Member], folder: Path, side: int | None) -> dict[str, Any]:
    """Read the shards of an archive in the order of their names; each is laid out on disk, where Arrow can map it."""
    paths = []
    for number, member in enumerate(members):
        path = folder / f"shard-{number}.parquet"
        with path.open("wb") as out:
            out.writelines(member.pieces())
        paths.append(path)
    try:
        return _parquet(paths, folder, side)
    finally:
        for path in paths:
            path.unlink()


def _parquet(paths: list[Path], folder: Path, side: int | None) -> dict[str, Any]:
    shards = [tables.parquet(path) for path in paths]
    given = shards[0][0]
    if any(names != given for names, _ in shards):
        raise Refusal("dataset_invalid", "the parquet files name different classes", "Write them with one schema.")

    def rows() -> Iterator[tuple[str, Callable[[], bytes], Any]]:
        for _, shard in shards:
            for name, data, label in shard:
                yield name, lambda data=data: data, label  # type: ignore[misc]

    return _collect("parquet", rows(), folder, given, side)


def _describe(layout: str, shape: tuple[int, ...], labels: list[int] | None, classes: list[str], names: list[str], writer: Writer) -> dict[str, Any]:
    counts = collections.Counter(labels or ())
    total = max(len(classes), max(counts, default=-1) + 1)
    return {
        "layout": layout,
        "count": shape[0],
        "height": shape[1],
        "width": shape[2],
        "channels": shape[3],
        "labelled": labels is not None,
        "class_names": classes,
        "per_class": [counts.get(label, 0) for label in range(total)] if labels is not None else [],
        "names": names,
        "unreadable": [],
        "resized": None,
        "ignored": [],
        "duplicates": {"count": len(writer.duplicates), "first": [[names[index] if names else index for index in pair] for pair in writer.duplicates[:20]]},
    }

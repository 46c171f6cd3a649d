"""Writes a data set again in the layout it came in, without what a manifest drops; kept files stay as they are, byte for byte."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from intake import archive, pickled, tables
from intake.archive import GZIP, ZIP, ZSTD, Member
from intake.dataset import ORDER, PARQUET, annotated
from intake.refusal import Refusal

Line = dict[str, Any]
Add = Callable[[str, bytes | Iterator[bytes]], None]


def rewrite(path: Path, folder: Path) -> dict[str, Any]:
    """Read the upload at `path` again and write `folder/cleansed.*`; return `{file, images}`.

    The folder holds `dataset.json`, as `dataset.take_in` wrote it, and the engine's `manifest.jsonl`. That is replaced by the final one: with class
    names for labels, with `path`, where each kept image is now, and with the files that could not be read.

    Raises `Refusal` when the file is not the one that was described.
    """
    described = json.loads((folder / "dataset.json").read_text())
    lines: list[Line] = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if head[:4] == PARQUET:
            out = folder / "cleansed.parquet"
            _parquet([(path, out)], described, lines)
        else:
            members = archive.members(file, path.stat().st_size, folder)
            if members is None:
                raise Refusal("damaged_file", "the upload is no archive any more", "Upload it again.")
            suffix = ".npz" if described["layout"] == "npz" else _suffix(head)
            out = folder / f"cleansed{suffix}"
            with _writing(out, suffix) as add:
                LAYOUTS[described["layout"]](members, described, lines, add, folder)
    _finish(folder / "manifest.jsonl", described, lines)
    return {"file": out.name, "images": sum(line["action"] != "dropped" for line in lines)}


def _suffix(head: bytes) -> str:
    return ".zip" if head[:4] in ZIP else ".tar.gz" if head[:2] == GZIP else ".tar.zst" if head[:4] == ZSTD else ".tar"


@contextmanager
def _writing(out: Path, suffix: str) -> Iterator[Add]:
    """Open an archive of a kind; equal contents become equal files."""
    if suffix in (".zip", ".npz"):
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as packed:

            def pack(name: str, data: bytes | Iterator[bytes]) -> None:
                with packed.open(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), "w", force_zip64=not isinstance(data, bytes)) as member:
                    for piece in [data] if isinstance(data, bytes) else data:
                        member.write(piece)

            yield pack
        return
    with out.open("wb") as raw:
        if suffix == ".tar.gz":
            stream: Any = gzip.GzipFile("", "wb", 6, raw, mtime=0)
        elif suffix == ".tar.zst":
            import zstandard

            stream = zstandard.ZstdCompressor().stream_writer(raw, closefd=False)
        else:
            stream = raw
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as target:

            def add(name: str, data: bytes | Iterator[bytes]) -> None:
                # A tar's entry begins with its size.
                data = data if isinstance(data, bytes) else b"".join(data)
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                target.addfile(entry, io.BytesIO(data))

            yield add
        if stream is not raw:
            stream.close()


def _finish(path: Path, described: dict[str, Any], lines: list[Line]) -> None:
    """Write the final manifest."""
    names = described["class_names"]
    with path.open("w") as out:
        for line in lines:
            said = {key: names[line[key]] if names else line[key] for key in ("given", "label")}
            out.write(json.dumps({**line, **said, "path": line.get("path")}) + "\n")
        for one in described["unreadable"]:
            missing = {"index": None, "name": one["name"], "action": "dropped", "given": None, "label": None, "score": None, "path": None}
            out.write(json.dumps({**missing, "reason": f"it cannot be read: {one['reason']}"}) + "\n")


def _kept(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["action"] != "dropped"]


def _word(old: str, label: int, names: list[str]) -> str:
    """Return a new label as the old one was written: as a number or as a name."""
    return str(label) if not names or (old.isascii() and old.isdigit()) else str(names[label])


def _order(members: dict[str, Member], add: Add) -> None:
    """Copy the list of class names, if there is one."""
    for name, member in members.items():
        if name.rsplit("/", 1)[-1] == ORDER:
            add(name, member.read())


def _class_folders(members: dict[str, Member], described: dict[str, Any], lines: list[Line], add: Add, folder: Path) -> None:
    """Copy kept images; a relabelled one moves to the folder of its new class, under its own name if that is free."""
    _order(members, add)
    taken = {line["name"].casefold() for line in lines if line["action"] == "kept"}
    for line in _kept(lines):
        name = line["name"]
        if line["action"] == "relabelled":
            *top, old, leaf = name.split("/")
            stem, dot, ending = leaf.rpartition(".")
            name, number = "/".join([*top, described["class_names"][line["label"]], leaf]), 0
            while name.casefold() in taken:
                number += 1
                own = f"{stem}-from-{old}{f'-{number}' if number > 1 else ''}{dot}{ending}"
                name = "/".join([*top, described["class_names"][line["label"]], own])
            taken.add(name.casefold())
        line["path"] = name
        add(name, members[line["name"]].read())


def _csv(members: dict[str, Member], described: dict[str, Any], lines: list[Line], add: Add, folder: Path) -> None:
    """Copy kept images and write the table again without the others' lines; further columns stay."""
    _order(members, add)
    table = next(name for name in members if name.lower().endswith((".csv", ".tsv")))
    rows, file, label, delimiter = tables.csv_rows(members[table])
    kept = {line["name"]: line for line in _kept(lines)}
    cells = {row[file].strip(): row[file].strip() for row in rows[1:] if row}
    # Pictures that could not be read are in the table and not in the manifest.
    by_cell = {cell: name for name, cell in tables.match(cells, [line["name"] for line in lines], table, partly=True).items()}
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows[1:]:
        line = kept.get(by_cell.get(row[file].strip(), "")) if row else None
        if line is not None:
            if line["action"] == "relabelled":
                row[label] = _word(row[label].strip(), line["label"], described["class_names"])
            writer.writerow(row)
    add(table, out.getvalue().encode())
    for line in kept.values():
        line["path"] = line["name"]
        add(line["name"], members[line["name"]].read())


def _webdataset(members: dict[str, Member], described: dict[str, Any], lines: list[Line], add: Add, folder: Path) -> None:
    """Copy kept images, each followed by its label."""
    _order(members, add)
    labels = annotated(members)
    for line in _kept(lines):
        line["path"] = line["name"]
        add(line["name"], members[line["name"]].read())
        name = labels[line["name"].rsplit(".", 1)[0]]
        data = members[name].read()
        if line["action"] == "relabelled":
            text = data.decode("utf-8", "replace").strip()
            if name.endswith(".cls"):
                data = _word(text, line["label"], described["class_names"]).encode()
            else:
                content = json.loads(text)
                key = next((key for key in tables.LABEL_COLUMNS if key in content), None) if isinstance(content, dict) else None
                old = content[key] if key else content
                new = line["label"] if isinstance(old, int) else _word(str(old), line["label"], described["class_names"])
                data = json.dumps({**content, key: new} if key else new).encode()
        add(name, data)


def _npz(members: dict[str, Member], described: dict[str, Any], lines: list[Line], add: Add, folder: Path) -> None:
    """Write the arrays again without the dropped rows, in their own shapes and types; arrays of another length are copied."""
    count = described["count"]
    rows = np.array([line["action"] != "dropped" for line in lines])
    labels = np.array([line["label"] for line in lines])
    label = tables.label_key(members)
    for name, member in members.items():
        shape, dtype, blocks = tables.rows_of(member)
        if name.removesuffix(".npy") == label:
            add(name, tables.npy_header((int(rows.sum()),), dtype) + labels[rows].astype(dtype).tobytes())
        elif shape and shape[0] == count and name != "class_names.npy":
            add(name, _kept_rows(tables.npy_header((int(rows.sum()), *shape[1:]), dtype), blocks, rows))
        else:
            add(name, member.read())
    for place, line in enumerate(_kept(lines)):
        line["path"] = str(place)


def _kept_rows(header: bytes, blocks: Iterator[np.ndarray], rows: np.ndarray) -> Iterator[bytes]:
    """Yield an array's header and the kept rows of its blocks: images fill more memory than the fence allows."""
    yield header
    start = 0
    for block in blocks:
        yield block[rows[start : start + len(block)]].tobytes()
        start += len(block)


def _cifar(members: dict[str, Member], described: dict[str, Any], lines: list[Line], add: Add, folder: Path) -> None:
    """Write the batches again without the dropped rows, as pickles of plain values."""
    waiting = iter(lines)
    batches = {line["name"].split("/", 1)[0] for line in lines}
    for name, member in sorted(members.items(), key=lambda item: item[0].rsplit("/", 1)[-1]):
        short = name.rsplit("/", 1)[-1]
        if short in tables.CIFAR[2]:
            add(name, member.read())
        if short not in batches:
            continue
        content, pixels, wanted = tables.cifar_batch(member)
        mine = [next(waiting) for _ in range(len(pixels))]
        rows = [place for place, line in enumerate(mine) if line["action"] != "dropped"]
        plain: dict[str, Any] = {}
        for key, value in content.items():
            if isinstance(value, list) and len(value) == len(pixels) and all(isinstance(one, (str, bytes, int)) for one in value):
                plain[key] = [mine[place]["label"] if key == wanted else value[place] for place in rows]
            elif isinstance(value, (str, bytes, int)):
                plain[key] = value
        plain["data"] = np.ascontiguousarray(pixels[rows])
        for place, row in enumerate(rows):
            mine[row]["path"] = f"{short}/{place}"
        add(name, pickled.batch(plain))


def _shards(members: dict[str, Member], described: dict[str, Any], lines: list[Line], add: Add, folder: Path) -> None:
    """Write every shard again."""
    names = sorted(name for name in members if name.endswith(".parquet"))
    pairs = []
    for number, name in enumerate(names):
        before, after = folder / f"shard-{number}.parquet", folder / f"shard-{number}-cleansed.parquet"
        with before.open("wb") as out:
            out.writelines(members[name].pieces())
        pairs.append((before, after))
    try:
        _parquet(pairs, described, lines)
        for name, (_, after) in zip(names, pairs, strict=True):
            add(name, after.read_bytes())
    finally:
        for pair in pairs:
            for path in pair:
                path.unlink(missing_ok=True)


def _parquet(pairs: list[tuple[Path, Path]], described: dict[str, Any], lines: list[Line]) -> None:
    """Write parquet files again without the dropped rows, with all columns and the schema's metadata."""
    unreadable = {one["position"] for one in described["unreadable"]}
    waiting = iter(lines)
    position = place = 0
    for before, after in pairs:
        pyarrow, file, column = tables.open_parquet(before)
        schema = file.schema_arrow
        with pyarrow.parquet.ParquetWriter(after, schema) as out:
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                mine = []
                for _ in range(batch.num_rows):
                    mine.append(None if position in unreadable else next(waiting))
                    position += 1
                changed = batch
                keep = [line is not None and line["action"] != "dropped" for line in mine]
                if column is not None:
                    values = batch.column(column).to_pylist()
                    for row, line in enumerate(mine):
                        if line is not None and line["action"] == "relabelled":
                            old = values[row]
                            values[row] = line["label"] if isinstance(old, int) else _word(str(old), line["label"], described["class_names"])
                    index = batch.schema.get_field_index(column)
                    changed = batch.set_column(index, schema.field(column), pyarrow.array(values, type=schema.field(column).type))
                for line in mine:
                    if line is not None and line["action"] != "dropped":
                        line["path"] = str(place)
                        place += 1
                out.write_batch(changed.filter(pyarrow.array(keep)))


LAYOUTS = {"class_folders": _class_folders, "csv": _csv, "webdataset": _webdataset, "npz": _npz, "cifar": _cifar, "parquet": _shards}

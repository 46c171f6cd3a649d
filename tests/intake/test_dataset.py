from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from PIL import Image

from core.images import ImageSet
from intake import dataset, door
from intake.refusal import Refusal

RNG = np.random.default_rng(0)


def picture(shape: tuple[int, ...] = (8, 9, 3), *, format: str = "PNG", pixels: np.ndarray | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8) if pixels is None else pixels).save(out, format, **options)
    return out.getvalue()


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def take(path: Path, tmp_path: Path) -> tuple[dict[str, Any], ImageSet]:
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    described = dataset.take_in(path, folder)
    return described, ImageSet.load(folder)


@pytest.mark.parametrize("top", ["", "data/", "data/images/"])
def test_class_folders_are_labels_in_alphabetical_order(tmp_path: Path, top: str) -> None:
    pixels = [RNG.integers(0, 256, (8, 9, 3), dtype=np.uint8) for _ in range(3)]
    names = ["dog/1.png", "cat/2.png", "cat/1.png"]
    files = {top + name: picture(pixels=array) for name, array in zip(names, pixels, strict=True)}
    described, found = take(archive(tmp_path / "x.zip", files | {top + "readme.txt": b"x", "__MACOSX/._1": b"x"}), tmp_path)
    assert described["class_names"] == ["cat", "dog"] and described["per_class"] == [2, 1]
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1]
    for index, original in enumerate((2, 1, 0)):
        assert np.array_equal(found.images[index].permute(1, 2, 0).numpy(), pixels[original])
    assert found.names == (top + "cat/1.png", top + "cat/2.png", top + "dog/1.png")


def test_grey_pictures_keep_one_channel_and_mixed_ones_three(tmp_path: Path) -> None:
    grey = RNG.integers(0, 256, (8, 9), dtype=np.uint8)
    files = {"a/1.png": picture(pixels=grey), "b/1.png": picture(pixels=grey.T[:9].T)}
    _, found = take(archive(tmp_path / "g.zip", files), tmp_path)
    assert found.images.shape == (2, 1, 8, 9) and np.array_equal(found.images[0, 0].numpy(), grey)
    _, found = take(archive(tmp_path / "m.zip", files | {"b/2.png": picture()}), tmp_path)
    assert found.images.shape == (3, 3, 8, 9) and np.array_equal(found.images[0, 2].numpy(), grey)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_lossless_formats_are_read_to_the_byte(tmp_path: Path, format: str) -> None:
    pixels = RNG.integers(0, 256, (8, 9, 3), dtype=np.uint8)
    options = {"lossless": True} if format == "WEBP" else {}
    data = picture(pixels=pixels, format=format, **options)
    _, found = take(archive(tmp_path / "x.zip", {f"a/1.{format.lower()}": data}), tmp_path)
    assert np.array_equal(found.images[0].permute(1, 2, 0).numpy(), pixels)


def test_unreadable_pictures_are_listed_and_the_rest_is_kept(tmp_path: Path) -> None:
    described, found = take(archive(tmp_path / "x.zip", {"a/1.png": picture(), "a/2.png": picture()[:50], "b/3.jpg": b"no"}), tmp_path)
    assert len(found) == 1
    assert [entry["name"] for entry in described["unreadable"]] == ["a/2.png", "b/3.jpg"]
    assert described["per_class"] == [1, 0]


@pytest.mark.parametrize("layout", ["last", "first", "grey"])
def test_npz(tmp_path: Path, layout: str) -> None:
    shape = {"last": (5, 8, 9, 3), "first": (5, 3, 8, 9), "grey": (5, 8, 9)}[layout]
    images, labels = RNG.integers(0, 256, shape, dtype=np.uint8), np.array([0, 2, 1, 2, 0], dtype=np.int32)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=labels, class_names=np.array(["a", "b", "c"]))
    described, found = take(tmp_path / "x.npz", tmp_path)
    wanted = {"last": images.transpose(0, 3, 1, 2) if layout == "last" else images, "first": images, "grey": images[:, None]}[layout]
    assert np.array_equal(found.images.numpy(), wanted)
    assert found.labels is not None and found.labels.tolist() == labels.tolist()
    assert described["per_class"] == [2, 1, 2] and described["class_names"] == ["a", "b", "c"]


def test_npz_without_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    described, found = take(tmp_path / "x.npz", tmp_path)
    assert found.labels is None and described["labelled"] is False


def linked(path: Path) -> Path:
    info = zipfile.ZipInfo("a/1.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(info, "/etc/passwd")
    return path


def npz(path: Path, **arrays: Any) -> Path:
    with path.open("wb") as out:
        np.savez(out, **arrays)
    return path


def lying_shape(path: Path) -> Path:
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000, 3), }".ljust(117) + b"\n"
    return archive(path, {"images.npy": header + b"\0" * 100})


class Marker:
    """What a hostile batch would run."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/marker",))


def tar(path: Path, files: dict[str, bytes], *, mode: str = "w:", link: str = "", kind: bytes = tarfile.SYMTYPE) -> Path:
    with tarfile.open(path, mode) as out:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = kind, "/etc/passwd"
            out.addfile(info)
    return path


def zst(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(zstandard.compress(tar(path, files).read_bytes()))
    return path


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def parquet(path: Path, columns: dict[str, Any], names: list[str] | None = None) -> Path:
    table = pyarrow.table(columns)
    if names:
        features = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, path)
    return path


def half_labelled(path: Path) -> Path:
    return parquet(path, {"image": [picture(), picture()], "label": ["cat", None]})


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as CIFAR's own archive has it: pickled by Python 2, where bytes are strings."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(" + b"".join(b"J" + struct.pack("<i", size) for size in data.shape)
        + b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", data.size) + data.tobytes() + b"tb"
    )  # fmt: skip
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u."


def batches(path: Path, batch: bytes, **more: bytes) -> Path:
    return tar(path, {f"cifar/{name}": data for name, data in {"data_batch_1": batch, **more}.items()}, mode="w:gz")


IMAGES = np.zeros((3, 8, 8, 3), np.uint8)
BAD: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "no zip": (lambda p: p.write_bytes(b"not a zip at all") and p, "unsupported_format", "neither a zip"),  # type: ignore[dict-item,return-value]
    "cut zip": (lambda p: p.write_bytes(archive(p, {"a/1.png": picture()}).read_bytes()[:60]) and p, "damaged_file", "cannot be read"),  # type: ignore[dict-item,return-value]
    "empty": (lambda p: archive(p, {}), "dataset_invalid", "is empty"),
    "no pictures": (lambda p: archive(p, {"a/x.txt": b"x"}), "dataset_invalid", "none of the 1 files"),
    "stray": (lambda p: archive(p, {"1.png": picture(), "a/2.png": picture()}), "dataset_invalid", "'1.png' is not in a class folder"),
    "two splits": (lambda p: archive(p, {"train/a/1.png": picture(), "test/a/2.png": picture()}), "dataset_invalid", "holds 2 sets"),
    "nested archive": (lambda p: archive(p, {"inner.zip": b"PK"}), "unsafe_file", "another archive, 'inner.zip'"),
    "tar link": (lambda p: tar(p, {}, link="a/1.png"), "unsafe_file", "a link"),
    "tar device": (lambda p: tar(p, {}, link="a/1.png", kind=tarfile.CHRTYPE), "unsafe_file", "a device"),
    "tar traversal": (lambda p: tar(p, {"a/../../1.png": picture()}), "unsafe_file", "leaves its folder"),
    "tar absolute": (lambda p: tar(p, {"/etc/1.png": picture()}), "unsafe_file", "leaves its folder"),
    "tar twice": (lambda p: tar(p, {"a/x.png": picture(), "a/X.PNG": picture()}), "unsafe_file", "twice"),
    "tar cut": (lambda p: cut(tar(p, {"a/1.png": picture(), "b/1.png": picture((300, 300, 3))}), 5000), "damaged_file", "past the end"),
    "gzip bomb": (lambda p: tar(p, {"a/1.png": b"\0" * (64 << 20)}, mode="w:gz"), "unsafe_file", "would grow"),
    "gzip cut": (lambda p: cut(tar(p, {"a/1.png": picture()}, mode="w:gz"), 100), "damaged_file", "gzip stream"),
    "gzip of text": (lambda p: p.write_bytes(gzip.compress(b"hello" * 500)) and p, "unsupported_format", "no tar archive"),  # type: ignore[dict-item,return-value]
    "zstd bomb": (lambda p: zst(p, {"a/1.png": b"\0" * (64 << 20)}), "unsafe_file", "would grow"),
    "zstd cut": (lambda p: cut(zst(p, {f"a/{n}.png": picture((90, 90, 3)) for n in range(9)}), 150_000), "damaged_file", "past the end"),
    "tar cut between files": (lambda p: cut(tar(p, {"a/1.png": picture(), "a/2.png": picture()}), 1024), "damaged_file", "its end is missing"),
    "zstd window": (lambda p: p.write_bytes(b"\x28\xb5\x2f\xfd\x00\xff" + b"\0" * 600) and p, "damaged_file", "zstd stream"),  # type: ignore[dict-item,return-value]
    "csv columns": (lambda p: archive(p, {"1.png": picture(), "l.csv": b"a,b\n1.png,cat\n"}), "dataset_invalid", "has the columns ['a', 'b']"),
    "csv formula": (lambda p: archive(p, {"1.png": picture(), "l.csv": b"file,label\n1.png,=1+1\n"}), "unsafe_file", "line 2 of l.csv has the label '=1+1'"),
    "csv missing": (lambda p: archive(p, {"1.png": picture(), "l.csv": b"file,label\n1.png,a\n2.png,b\n"}), "dataset_invalid", "the first is '2.png'"),
    "csv ambiguous": (lambda p: archive(p, {"a/1.png": picture(), "b/1.png": picture(), "l.csv": b"file,label\n1.png,a\n"}), "dataset_invalid", "is 2 files"),
    "csv twice": (lambda p: archive(p, {"1.png": picture(), "l.csv": b"file,label\n1.png,a\n1.png,b\n"}), "dataset_invalid", "two labels"),
    "csv short line": (lambda p: archive(p, {"1.png": picture(), "l.csv": b"file,label\n1.png\n"}), "dataset_invalid", "line 2"),
    "csv quotes": (lambda p: archive(p, {"1.png": picture(), "l.csv": b'file,label\n"1.png'}), "damaged_file", "l.csv cannot be read"),
    "two csv": (lambda p: archive(p, {"1.png": picture(), "l.csv": b"", "m.csv": b""}), "dataset_invalid", "2 CSV files"),
    "unlisted class": (lambda p: archive(p, {"a/1.png": picture(), "b/1.png": picture(), "classes.txt": b"a\nc"}), "dataset_invalid", "class 'b'"),
    "half labelled": (lambda p: half_labelled(p), "dataset_invalid", "1 of 2 images have no label"),
    "parquet of numbers": (lambda p: parquet(p, {"x": [1, 2]}), "dataset_invalid", "none of the columns ['x']"),
    "parquet cut": (lambda p: cut(parquet(p, {"image": [picture()] * 3, "label": [0, 1, 1]}), 200), "damaged_file", "parquet"),
    "parquet bomb": (lambda p: parquet(p, {"image": [b"\0" * 1_000_000] * 2000}), "unsafe_file", "would grow"),
    "cifar objects": (lambda p: batches(p, pickle.dumps({"data": Marker(), "labels": []})), "unsafe_file", "wants to import"),
    "cifar lengths": (lambda p: batches(p, python2_batch(np.zeros((2, 3072), np.uint8), [1])), "damaged_file", "for 1 labels"),
    "two sizes": (lambda p: archive(p, {"a/1.png": picture(), "a/2.png": picture((9, 9, 3))}), "dataset_invalid", "differ in size: 8x9 and 9x9"),
    "nothing readable": (lambda p: archive(p, {"a/1.png": b"x"}), "dataset_invalid", "none of 1 images"),
    "traversal": (lambda p: archive(p, {"a/../../1.png": picture()}), "unsafe_file", "leaves its folder"),
    "absolute": (lambda p: archive(p, {"/a/1.png": picture()}), "unsafe_file", "leaves its folder"),
    "control characters": (lambda p: archive(p, {"a/1\x1b[2J.png": picture()}), "unsafe_file", "hides something"),
    "link": (linked, "unsafe_file", "a link"),
    "case collision": (lambda p: archive(p, {"a/x.png": picture(), "a/X.png": picture()}), "unsafe_file", "twice"),
    "bomb": (lambda p: archive(p, {"a/1.png": b"\0" * (8 << 20)}), "unsafe_file", "would grow"),
    "no images": (lambda p: npz(p, labels=np.zeros(3)), "dataset_invalid", "no `images`"),
    "objects": (lambda p: npz(p, images=np.array([{}, {}])), "unsafe_file", "Python objects"),
    "floats": (lambda p: npz(p, images=IMAGES.astype(float)), "dataset_invalid", "is float64"),
    "no rows": (lambda p: npz(p, images=IMAGES[:0]), "dataset_invalid", "empty"),
    "five channels": (lambda p: npz(p, images=np.zeros((2, 8, 8, 5), np.uint8)), "dataset_invalid", "1 or 3 channels"),
    "label count": (lambda p: npz(p, images=IMAGES, labels=np.zeros(2, int)), "dataset_invalid", "for 3 images"),
    "negative label": (lambda p: npz(p, images=IMAGES, labels=np.array([0, -1, 0])), "dataset_invalid", "from -1"),
    "huge label": (lambda p: npz(p, images=IMAGES, labels=np.array([0, 10**9, 0])), "dataset_invalid", "1000000000"),
    "nameless label": (lambda p: npz(p, images=IMAGES, labels=np.array([0, 1, 2]), class_names=np.array(["a"])), "dataset_invalid", "has no name"),
    "lying shape": (lying_shape, "damaged_file", "claims shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_sets_have_their_own_answer(tmp_path: Path, name: str) -> None:
    make, code, words = BAD[name]
    path = make(tmp_path / "bad.npz")
    (tmp_path / "out").mkdir()
    with pytest.raises(Refusal) as refusal:
        dataset.take_in(path, tmp_path / "out")
    assert refusal.value.code == code, refusal.value.message
    assert words in refusal.value.message
    assert refusal.value.advice


def test_the_fence_denies_what_a_reader_does_not_need() -> None:
    found = door.self_test()
    assert {"rlimits", "no_new_privs", "seccomp"} <= set(found["layers"])
    assert found["denies"]["network"] and found["denies"]["subprocess"] and found["denies"]["kill"]
    assert found["denies"]["files"] == ("landlock" in found["layers"])


def test_the_engine_has_no_network(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = (
        "import socket; from intake import fence; print(fence.confine_engine(memory=None, file_bytes=1 << 30)); socket.socket(socket.AF_UNIX); socket.socket()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "seccomp" in done.stdout and "PermissionError" in done.stderr


# -- layouts: the same images and labels, to the byte ------------------------------------------------------------------


PIXELS = [RNG.integers(0, 256, (8, 9, 3), dtype=np.uint8) for _ in range(4)]
PNG = [picture(pixels=array) for array in PIXELS]
# Four images, two of each class; `c1` and `d1` come before `c2` and `d2`.
FOLDERS = {"cat/c1.png": PNG[0], "cat/c2.png": PNG[1], "dog/d1.png": PNG[2], "dog/d2.png": PNG[3]}
FLAT = {name.rsplit("/", 1)[-1]: data for name, data in FOLDERS.items()}
NAMED = ["cat", "cat", "dog", "dog"]
ROWS = list(zip(FLAT, NAMED, strict=True))


def written(header: str, rows: list[tuple[str, str]], delimiter: str = ",") -> bytes:
    return "\n".join([header, *(delimiter.join(row) for row in rows)]).encode()


def sharded(samples: dict[str, bytes], ending: str, labels: list[Any]) -> dict[str, bytes]:
    files = dict(samples)
    for name, label in zip(samples, labels, strict=True):
        files[name.rsplit(".", 1)[0] + ending] = label if isinstance(label, bytes) else str(label).encode()
    return files


def two_shards(path: Path) -> Path:
    files = {}
    for number, part in enumerate((slice(0, 2), slice(2, 4))):
        shard = parquet(
            path.with_suffix(f".{number}"), {"image": [{"bytes": data, "path": "x"} for data in PNG[part]], "label": [number, number]}, ["cat", "dog"]
        )
        files[f"data/train-{number:05}-of-00002.parquet"] = shard.read_bytes()
    return archive(path, files)


LAYOUTS: dict[str, tuple[Callable[[Path], Path], list[str] | None]] = {
    "zip of class folders": (lambda p: archive(p, FOLDERS), ["cat", "dog"]),
    "zip below a top folder": (lambda p: archive(p, {f"top/inner/{name}": data for name, data in FOLDERS.items()}), ["cat", "dog"]),
    "zip with rubbish": (lambda p: archive(p, {**FOLDERS, "__MACOSX/cat/._c1.png": b"x", "cat/.DS_Store": b"x", "cat/Thumbs.db": b"x"}), ["cat", "dog"]),
    "tar": (lambda p: tar(p, FOLDERS), ["cat", "dog"]),
    "tar with dots": (lambda p: tar(p, {f"./{name}": data for name, data in FOLDERS.items()}), ["cat", "dog"]),
    "tar in another order": (lambda p: tar(p, dict(reversed(FOLDERS.items()))), ["cat", "dog"]),
    "tar.gz": (lambda p: tar(p, FOLDERS, mode="w:gz"), ["cat", "dog"]),
    "tar.zst": (lambda p: zst(p, FOLDERS), ["cat", "dog"]),
    "csv of file names": (lambda p: archive(p, {**FLAT, "labels.csv": written("filename,label", ROWS)}), ["cat", "dog"]),
    "csv of stems": (lambda p: archive(p, {**FLAT, "train.csv": written("id,label", [(n[:-4], c) for n, c in ROWS])}), ["cat", "dog"]),
    "csv of paths": (lambda p: archive(p, {**{f"img/{n}": d for n, d in FLAT.items()}, "l.csv": written("path,class", [(f"img/{n}", c) for n, c in ROWS])}), ["cat", "dog"]),
    "csv with semicolons": (lambda p: archive(p, {**FLAT, "l.csv": written("file;extra;target", [(n, "x", c) for n, c in ROWS], ";")}), ["cat", "dog"]),
    "tsv in a tar": (lambda p: tar(p, {**FLAT, "l.tsv": written("file\tlabel", ROWS, "\t")}), ["cat", "dog"]),
    "csv with a byte order mark": (lambda p: archive(p, {**FLAT, "l.csv": b"\xef\xbb\xbf" + written("file,label", ROWS)}), ["cat", "dog"]),
    "csv of indices": (lambda p: archive(p, {**FLAT, "l.csv": written("file,label", [(n, str(int(c == "dog"))) for n, c in ROWS])}), []),
    "csv of indices with names": (lambda p: archive(p, {**FLAT, "classes.txt": b"cat\ndog\n", "l.csv": written("file,label", [(n, str(int(c == "dog"))) for n, c in ROWS])}), ["cat", "dog"]),
    "webdataset, .cls": (lambda p: tar(p, sharded(FLAT, ".cls", [0, 0, 1, 1])), []),
    "webdataset, .cls in folders": (lambda p: tar(p, sharded(FOLDERS, ".cls", NAMED)), ["cat", "dog"]),
    "webdataset, .json": (lambda p: tar(p, sharded(FLAT, ".json", [json.dumps({"label": name}).encode() for name in NAMED])), ["cat", "dog"]),
    "parquet of structs": (lambda p: parquet(p, {"image": [{"bytes": d, "path": None} for d in PNG], "label": [0, 0, 1, 1]}, ["cat", "dog"]), ["cat", "dog"]),
    "parquet of bytes": (lambda p: parquet(p, {"image": PNG, "label": NAMED}), ["cat", "dog"]),
    "parquet shards in a zip": (two_shards, ["cat", "dog"]),
    "npz": (lambda p: npz(p, images=np.stack(PIXELS), labels=np.array([0, 0, 1, 1])), []),
    "npz, channels first, named": (lambda p: npz(p, x=np.stack(PIXELS).transpose(0, 3, 1, 2), y=np.array([0, 0, 1, 1]), class_names=np.array(["cat", "dog"])), ["cat", "dog"]),
    "explicit order": (lambda p: archive(p, {**FOLDERS, "classes.txt": b"cat\ndog"}), ["cat", "dog"]),
    "unlabelled": (lambda p: archive(p, FLAT), None),
    "unlabelled tar below a folder": (lambda p: tar(p, {f"all/{name}": data for name, data in FLAT.items()} | {"readme.txt": b"x"}), ["all"]),
    "unlabelled parquet": (lambda p: parquet(p, {"image": PNG}), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_images_and_labels(tmp_path: Path, name: str) -> None:
    make, classes = LAYOUTS[name]
    folder = tmp_path / "out"
    folder.mkdir()
    # Through the fenced child, as the service does.
    verdict = door.examine("dataset", make(tmp_path / "upload.bin"), folder)
    assert verdict.ready, verdict
    found = ImageSet.load(folder)
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), np.stack(PIXELS))
    if classes is None:
        assert found.labels is None and verdict.description["labelled"] is False and verdict.description["per_class"] == []
    else:
        assert found.labels is not None and found.labels.tolist() == ([0, 0, 0, 0] if classes == ["all"] else [0, 0, 1, 1])
        assert verdict.description["class_names"] == classes
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "dataset.safetensors"]


def test_an_order_of_classes_is_the_order_of_labels(tmp_path: Path) -> None:
    described, found = take(archive(tmp_path / "x.zip", {**FOLDERS, "classes.txt": b"zebra\ndog\ncat\n"}), tmp_path)
    assert described["class_names"] == ["zebra", "dog", "cat"] and described["per_class"] == [0, 2, 2]
    assert found.labels is not None and found.labels.tolist() == [2, 2, 1, 1]
    described, _ = take(archive(tmp_path / "n.zip", {"10/a.png": PNG[0], "9/b.png": PNG[1]}), tmp_path)
    assert described["class_names"] == ["10", "9"]


@pytest.mark.parametrize("by", ["python 2", "python 3"])
def test_cifar_batches(tmp_path: Path, by: str) -> None:
    pixels, labels = RNG.integers(0, 256, (6, 3072), dtype=np.uint8), [3, 1, 0, 2, 2, 1]

    def batch(part: slice) -> bytes:
        if by == "python 2":
            return python2_batch(pixels[part], labels[part])
        return pickle.dumps({b"data": pixels[part], b"labels": labels[part], b"filenames": [b"x.png"] * len(labels[part])}, protocol=2)

    meta = pickle.dumps({"label_names": list("abcd")}, protocol=2)
    path = batches(tmp_path / "cifar.tar.gz", batch(slice(0, 4)), data_batch_2=batch(slice(4, 6)), test_batch=batch(slice(0, 2)), **{"batches.meta": meta})
    described, found = take(path, tmp_path)
    assert np.array_equal(found.images.reshape(6, 3072).numpy(), pixels)
    assert found.labels is not None and found.labels.tolist() == labels
    assert described["class_names"] == list("abcd") and described["ignored"] == ["test_batch"] and described["layout"] == "cifar"


def test_cifar_100_takes_the_fine_labels(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)
    train = pickle.dumps({b"data": pixels, b"fine_labels": [1, 0], b"coarse_labels": [7, 7]}, protocol=2)
    path = tar(tmp_path / "x.tar", {"cifar-100-python/train": train, "cifar-100-python/file.txt~": b""})
    _, found = take(path, tmp_path)
    assert found.labels is not None and found.labels.tolist() == [1, 0]


def test_equal_images_are_counted_and_turned_ones_turned(tmp_path: Path) -> None:
    described, _ = take(archive(tmp_path / "x.zip", {**FOLDERS, "dog/copy.png": PNG[0]}), tmp_path)
    assert described["duplicates"] == {"count": 1, "first": [["cat/c1.png", "dog/copy.png"]]}
    for kind, options in (("JPEG", {"quality": 100, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        image = Image.fromarray(PIXELS[0])
        exif = image.getexif()
        exif[0x0112] = 6
        out = io.BytesIO()
        image.save(out, kind, exif=exif, **options)  # type: ignore[arg-type]
        _, found = take(archive(tmp_path / "y.zip", {f"a/1.{kind.lower()}": out.getvalue()}), tmp_path)
        turned = np.rot90(PIXELS[0], -1)
        assert found.images.shape[2:] == (9, 8), kind
        if kind != "JPEG":
            assert np.array_equal(found.images[0].permute(1, 2, 0).numpy(), turned), kind


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_of_picture_is_read(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(PIXELS[0]).convert("L").convert("I").convert("I;16") if mode == "I;16" else Image.fromarray(PIXELS[0]).convert(mode)
    out = io.BytesIO()
    image.save(out, "TIFF" if mode == "CMYK" else "PNG")
    _, found = take(archive(tmp_path / "x.zip", {"a/1.png": out.getvalue()}), tmp_path)
    assert found.images.shape[2:] == (8, 9)


def test_pictures_of_all_sizes_become_squares_on_request(tmp_path: Path) -> None:
    tall, wide = (RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 20, 3), (24, 48, 3)))
    upload = archive(tmp_path / "x.zip", {"a/1.png": picture(pixels=tall), "b/1.png": picture(pixels=wide)})
    with pytest.raises(Refusal, match="differ in size") as refused:
        take(upload, tmp_path)
    assert "`resize`" in refused.value.advice
    verdict = door.examine("dataset", upload, tmp_path / "out", resize=16)
    assert verdict.ready and verdict.description["resized"] == 16
    found = ImageSet.load(tmp_path / "out").images.permute(0, 2, 3, 1).numpy()
    # The middle square, scaled.
    for index, square in enumerate((tall[10:30], wide[:, 12:36])):
        wanted = np.asarray(Image.fromarray(square).resize((16, 16), Image.Resampling.BILINEAR))
        # At the border the filter also reads what lies just outside the square.
        assert np.abs(found[index].astype(int) - wanted)[1:-1, 1:-1].max() <= 1
    with pytest.raises(Refusal, match="arrays are not resized"):
        dataset.take_in(npz(tmp_path / "x.npz", images=np.stack(PIXELS), labels=np.array([0, 0, 1, 1])), tmp_path / "out", 16)

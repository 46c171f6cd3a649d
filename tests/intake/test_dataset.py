from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
    np.savez(path, **arrays)
    return path


def lying_shape(path: Path) -> Path:
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000, 3), }".ljust(117) + b"\n"
    return archive(path, {"images.npy": header + b"\0" * 100})


IMAGES = np.zeros((3, 8, 8, 3), np.uint8)
BAD: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "no zip": (lambda p: p.write_bytes(b"not a zip at all") and p, "unsupported_format", "neither a zip"),  # type: ignore[dict-item,return-value]
    "cut zip": (lambda p: p.write_bytes(archive(p, {"a/1.png": picture()}).read_bytes()[:60]) and p, "damaged_file", "cannot be read"),  # type: ignore[dict-item,return-value]
    "empty": (lambda p: archive(p, {}), "dataset_invalid", "is empty"),
    "no pictures": (lambda p: archive(p, {"a/x.txt": b"x"}), "dataset_invalid", "none of the 1 files"),
    "no folders": (lambda p: archive(p, {"1.png": picture(), "2.png": picture()}), "dataset_invalid", "not in a class folder"),
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

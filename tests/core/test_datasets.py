"""Data sets by name: decoded once, kept whole, refused with a reason."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core import datasets
from core.errors import BadDataset

MAKE = np.random.default_rng(0)


def picture(size: int = 10) -> Image.Image:
    return Image.fromarray(MAKE.integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_class_folders_are_resized_and_cached(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("ant", "bee"):
            (tmp_path / "insects" / split / name).mkdir(parents=True)
            for index in range(count):
                picture(10 + index).save(tmp_path / "insects" / split / name / f"{index}.png")
    train, test = datasets.load("folder", tmp_path / "insects", tmp_path / "cache", size=16)
    assert train.images.shape == (6, 3, 16, 16) and len(test) == 4 and train.class_names == ("ant", "bee")
    assert train.labels is not None and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "insects" / "train").rename(tmp_path / "gone")
    again, _ = datasets.load("folder", tmp_path / "insects", tmp_path / "cache", size=16)
    assert (again.images == train.images).all()
    with pytest.raises(BadDataset, match="not at"):
        datasets.load("folder", tmp_path / "insects", tmp_path / "cache", size=8)
    with pytest.raises(BadDataset, match="need a size"):
        datasets.load("folder", tmp_path / "insects", tmp_path / "cache")


def test_cifar_from_zips_of_class_folders(tmp_path: Path) -> None:
    pixels = {}
    for archive, split, numbers in (("train-1of2.zip", "train", (0, 2)), ("train-2of2.zip", "train", (1,)), ("test.zip", "test", (0,))):
        with zipfile.ZipFile(tmp_path / archive, "w") as out:
            for name in ("cat", "dog"):
                for number in numbers:
                    image, data = picture(32), io.BytesIO()
                    image.save(data, "WEBP", lossless=True)
                    out.writestr(f"{split}/{name}/{number:04}.webp", data.getvalue())
                    pixels[split, name, number] = np.asarray(image)
    train, test = datasets.load("cifar10", tmp_path, tmp_path / "cache")
    assert train.labels is not None and train.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(test) == 2
    for index, key in enumerate([("cat", 0), ("cat", 1), ("cat", 2), ("dog", 0), ("dog", 1), ("dog", 2)]):
        assert (train.images[index].permute(1, 2, 0).numpy() == pixels["train", *key]).all()


def test_grey_digits_through_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 5), ("t10k", 3)):
        images, labels = MAKE.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    train, test = datasets.load("mnist", tmp_path, tmp_path / "cache")
    assert train.images.shape == (5, 1, 28, 28) and len(test) == 3 and len(train.class_names) == 10


def test_unknown_and_missing_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match="no data set 'cifar11'") as caught:
        datasets.load("cifar11", tmp_path, tmp_path / "cache")
    assert "gtsrb" in caught.value.advice
    with pytest.raises(BadDataset, match="cifar100 is not at"):
        datasets.load("cifar100", tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache" / "cifar100-32").exists()

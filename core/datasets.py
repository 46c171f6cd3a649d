"""Well-known data sets by name, decoded once: for benchmarks and for whoever trains a victim. Not for strangers' files.

`cifar10` is read from three zips of class folders when they are there, else everything comes through torchvision.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from core.errors import BadDataset
from core.images import ImageSet, from_arrays

SIZES = {"cifar10": 32, "cifar100": 32, "gtsrb": 32, "mnist": 28}
NAMES = (*SIZES, "folder")


def load(name: str, source: Path, cache: Path, *, size: int | None = None, download: bool = False) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test set; decoded images are kept in `cache` and memory-mapped from there.

    Args:
        name: `cifar10`, `cifar100`, `gtsrb` (torchvision's splits), `mnist`, or `folder`: `train/CLASS/*` and `test/CLASS/*` (or `val`).
        source: where the files are, or go if `download` is allowed.
        size: height and width the images are resized to; the usual one when left out. A `folder` needs it.

    Raises `BadDataset` when the name is unknown or the files are not there.
    """
    if name not in NAMES:
        raise BadDataset(f"there is no data set {name!r}", f"Names: {', '.join(NAMES)}.")
    size = size or SIZES.get(name)
    if size is None:
        raise BadDataset("a folder's images need a size", "Say how large they shall be, in pixels.")
    kept = cache / f"{name}-{size}"
    if name == "folder":
        kept = cache / f"{source.resolve().name}-{size}"
    if not (kept / "test" / "dataset.json").exists():
        made = _zips(source) if name == "cifar10" and (source / "test.zip").exists() else _torchvision(name, source, size, download=download)
        cache.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a stop midway must not leave half a data set behind.
        partial = Path(tempfile.mkdtemp(dir=cache))
        for split, data in zip(("train", "test"), made, strict=True):
            data.save(partial / split)
        shutil.rmtree(kept, ignore_errors=True)
        partial.rename(kept)
    return ImageSet.load(kept / "train"), ImageSet.load(kept / "test")


def _zips(source: Path) -> tuple[ImageSet, ImageSet]:
    """Read `train-1of2.zip`, `train-2of2.zip` and `test.zip`: SPLIT/CLASS/NNNN.webp, sorted by class and number."""
    return tuple(_zip([source / name for name in names]) for names in (("train-1of2.zip", "train-2of2.zip"), ("test.zip",)))  # type: ignore[return-value]


def _zip(paths: list[Path]) -> ImageSet:
    members: list[tuple[str, str, zipfile.ZipFile, str]] = []
    for path in paths:
        archive = zipfile.ZipFile(path)
        for name in archive.namelist():
            if name.endswith(".webp"):
                folder, file = name.split("/")[-2:]
                members.append((folder, file, archive, name))
    members.sort(key=lambda member: member[:2])
    classes = sorted({member[0] for member in members})
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for _, _, archive, name in members])
    return from_arrays(pixels, np.array([classes.index(member[0]) for member in members]), tuple(classes))


def _torchvision(name: str, source: Path, size: int, *, download: bool) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets

    try:
        if name == "folder":
            test = source / "test" if (source / "test").is_dir() else source / "val"
            found = [datasets.ImageFolder(str(path)) for path in (source / "train", test)]
        elif name == "gtsrb":
            found = [datasets.GTSRB(str(source), split=split, download=download) for split in ("train", "test")]
        else:
            kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "mnist": datasets.MNIST}[name]
            found = [kind(str(source), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise BadDataset(f"{name} is not at {source}: {error}", "Point to the folder that holds it, or allow the download.") from error
    return tuple(_decoded(one, size, getattr(one, "classes", [])) for one in found)  # type: ignore[return-value]


def _decoded(pairs: Iterable[tuple[Any, int]], size: int, classes: list[str]) -> ImageSet:
    images, labels = [], []
    for picture, label in pairs:
        grey = picture.mode == "L"
        resized = picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BILINEAR)
        images.append(np.asarray(resized)[..., None] if grey else np.asarray(resized.convert("RGB")))
        labels.append(int(label))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return ImageSet(pixels, torch.tensor(labels), tuple(map(str, classes)))

"""ImageSet: labelled uint8 images in memory or memory-mapped, and the folder form intake writes them in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from core.errors import BadDataset

# Pixels' values that go through a network together: 2,700 images of CIFAR-10, 55 of ImageNet.
VALUES = 1 << 23


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of them.

    Attributes:
        images: (N, C, H, W) uint8 in 0..255; channels-last in memory.
        labels: (N,) int64 class indices, or None.
        class_names: one name a class, in label order; empty when unknown.
        names: where each image came from; empty when unknown.
    """

    images: torch.Tensor
    labels: torch.Tensor | None = None
    class_names: tuple[str, ...] = ()
    names: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise BadDataset(f"images must be uint8 of shape (N, C, H, W), not {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels is not None and self.labels.shape != (len(self.images),):
            raise BadDataset(f"{len(self.images)} images but labels of shape {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        """How many classes the labels speak of."""
        if self.class_names:
            return len(self.class_names)
        return 0 if self.labels is None or not len(self) else int(self.labels.max()) + 1

    def to(self, device: torch.device) -> ImageSet:
        """Return the set with its tensors on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def placed(self, device: torch.device) -> ImageSet:
        """Return the set on `device` if half of its free memory holds it; else as it is, to be moved batch by batch."""
        if device.type == "cuda" and self.images.numel() > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return self.to(device)

    def subset(self, indices: torch.Tensor) -> ImageSet:
        """Return the images at `indices` (int64), in that order."""
        indices = indices.to(self.images.device)
        names = tuple(self.names[int(index)] for index in indices) if self.names else ()
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, images=self.images[indices], labels=labels, names=names)

    def sample(self, count: int, generator: torch.Generator) -> ImageSet:
        """Return `count` images drawn without replacement (all of them if there are fewer)."""
        return self.subset(torch.randperm(len(self), generator=generator)[:count])

    def repeated(self, count: int) -> ImageSet:
        """Return the set as often after itself as it takes to have `count` images; itself when it has four fifths of them."""
        # A tenth is kept aside from every purification: what is left of a large enough set is not gone through twice for that.
        return self.subset(torch.arange(len(self)).repeat(-(-count // len(self)))) if 0 < len(self) < 0.8 * count else self

    @classmethod
    def load(cls, folder: Path) -> ImageSet:
        """Read the folder form: `dataset.safetensors` and `dataset.json`. Images are memory-mapped.

        Raises `BadDataset` when the folder does not hold a data set.
        """
        try:
            description = json.loads((folder / "dataset.json").read_text())
            with safe_open(folder / "dataset.safetensors", framework="pt") as file:
                images = file.get_tensor("images")
                labels = file.get_tensor("labels") if "labels" in file.keys() else None
        except (OSError, ValueError) as error:
            raise BadDataset(f"{folder} holds no readable data set: {error}", "Take the folder that `python -m intake dataset` wrote.") from error
        return cls(
            images=images.permute(0, 3, 1, 2),
            labels=labels,
            class_names=tuple(description.get("class_names", ())),
            names=tuple(description.get("names", ())),
        )

    def save(self, folder: Path) -> None:
        """Write the folder form that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"images": self.images.permute(0, 2, 3, 1).contiguous()}
        if self.labels is not None:
            tensors["labels"] = self.labels
        save_file(tensors, folder / "dataset.safetensors")
        description = {"class_names": list(self.class_names), "names": list(self.names)}
        (folder / "dataset.json").write_text(json.dumps(description))


def from_arrays(images: np.ndarray, labels: np.ndarray | None, class_names: tuple[str, ...] = ()) -> ImageSet:
    """Make a set of (N, H, W, C) uint8 images and (N,) integer labels."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return ImageSet(tensor, None if labels is None else torch.from_numpy(np.asarray(labels, dtype=np.int64)), class_names)


def at_once(values: int, most: int) -> int:
    """Return how many parts of so many pixels' values go through a network together: `most`, or fewer where they are large; one at least."""
    return max(min(VALUES // max(values, 1), most), 1)


def as_floats(images: torch.Tensor) -> torch.Tensor:
    """Turn (N, C, H, W) uint8 images into channels-last floats in [0, 1]."""
    return images.to(dtype=torch.float32, memory_format=torch.channels_last).div_(255)

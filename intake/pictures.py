"""Pictures to arrays: a few formats, a cap on pixels, upright, RGB; and the writer of the one uint8 tensor."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
# What a damaged or hostile picture makes Pillow raise; each is that picture's reason, not the data set's.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError, IndexError, KeyError, TypeError)
MAX_PIXELS = 16_000_000
HEADER = 4096
CHUNK = 1 << 20


def is_picture(name: str) -> bool:
    """Say whether a file's name has a picture's ending."""
    return "." + name.rsplit(".", 1)[-1].lower() in ENDINGS


def decode(data: bytes, side: int | None = None) -> np.ndarray:
    """Return an image as (H, W, 3) uint8, upright; raises one of `UNREADABLE`.

    With `side`, its shorter side is scaled to that (bilinear, antialiased), and the middle square is what is left.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} are taken")
                if min(image.size) < 1:
                    raise ValueError("no pixels")
                # Looking for an orientation costs as much as decoding a small picture; most say nothing of one.
                turned = image.format in ("JPEG", "TIFF", "MPO") or b"eXIf" in data or b"EXIF" in data
                upright = (ImageOps.exif_transpose(image) if turned else image).convert("RGB")
                return np.asarray(upright if side is None else ImageOps.fit(upright, (side, side), Image.Resampling.BILINEAR))
        except Image.DecompressionBombWarning as bomb:
            raise ValueError(str(bomb)) from bomb
        except UnidentifiedImageError as error:
            raise ValueError(f"it is none of {', '.join(FORMATS)}, or it is damaged") from error


class Writer:
    """Writes (N, H, W, C) uint8 images and labels as safetensors whose header is filled in at the end.

    Attributes:
        duplicates: pairs (first, again) of indices of images with the same pixels.
    """

    def __init__(self, folder: Path, *, pictures: bool) -> None:
        self._path = folder / "dataset.safetensors"
        self._file = self._path.open("w+b")
        self._file.write(b"\0" * (8 + HEADER))
        self._shape: tuple[int, ...] = ()
        self._count = 0
        # Arrays say how many channels they have; decoded pictures are RGB until all prove grey.
        self._grey = pictures
        self._seen: dict[bytes, int] = {}
        self.duplicates: list[tuple[int, int]] = []

    def add(self, image: np.ndarray) -> None:
        """Append one (H, W, 3) image."""
        self._grey = self._grey and bool((image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all())
        self.add_many(image[None])

    def add_many(self, images: np.ndarray) -> None:
        """Append (N, H, W, C) images."""
        self._shape = images.shape[1:]
        for index, image in enumerate(images, start=self._count):
            first = self._seen.setdefault(hashlib.blake2b(image.tobytes(), digest_size=16).digest(), index)
            if first != index:
                self.duplicates.append((first, index))
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

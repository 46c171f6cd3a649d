"""Batched, seeded augmentation on whatever device the images are on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field

from core.catalog import Params

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


class Mirroring(Params):
    """Parameters of everything that augments images."""

    mirror: bool = Field(
        default=True,
        title="Mirror",
        description="Half of the augmented images are mirrored. Off where a mirrored image means something else: digits, text, traffic signs.",
    )


def crop_and_flip(padding: int | None = None, *, mirror: bool = True) -> Augment:
    """Return the usual CIFAR augmentation: zero-pad, crop back to size at random, mirror half of the images (or none).

    Unless `padding` is given it is an eighth of the shorter side: the published 4 pixels on images of 32x32, and as far for the eye on others.
    The result maps (N, C, H, W) to the same shape and dtype. Draws come from the generator (on the CPU), so that
    they are the same on every device.
    """

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, _, height, width = images.shape
        device = images.device
        border = round(min(height, width) / 8) if padding is None else padding
        top = torch.randint(0, 2 * border + 1, (count, 1), generator=generator).to(device)
        left = torch.randint(0, 2 * border + 1, (count, 1), generator=generator).to(device)
        columns = torch.arange(width, device=device)
        if mirror:
            mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
            columns = torch.where(mirrored, width - 1 - columns, columns)
        columns = columns + left
        rows = torch.arange(height, device=device) + top
        padded = F.pad(images, (border,) * 4).permute(0, 2, 3, 1)
        # Whole pixels by their number: several times as fast as by image, row and column.
        which = (torch.arange(count, device=device)[:, None] * padded.shape[1] + rows)[:, :, None] * padded.shape[2] + columns[:, None, :]
        return padded.flatten(0, 2).index_select(0, which.flatten()).view(count, height, width, padded.shape[3]).permute(0, 3, 1, 2)

    return augment


def none(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Leave the images as they are."""
    return images


def cutout(side: int) -> Augment:
    """Return Cutout (DeVries and Taylor, 2017): one grey square of `side` pixels an image, whose centre lies anywhere in it."""

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, _, height, width = images.shape
        middle = torch.stack([torch.randint(0, extent, (count,), generator=generator) for extent in (height, width)]).to(images.device)
        rows = (torch.arange(height, device=images.device)[None] - middle[0][:, None]).abs() <= side // 2
        columns = (torch.arange(width, device=images.device)[None] - middle[1][:, None]).abs() <= side // 2
        grey = 0.5 if images.is_floating_point() else 127
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], grey)

    return augment


def simclr(*, scale: tuple[float, float] = (0.2, 1.0), jitter: float = 0.4, grey: float = 0.2, mirror: bool = True) -> Augment:
    """Return SimCLR's augmentation for small images: random resized crop, flip (or none), colour jitter (p 0.8) and greyscale.

    It maps float images (N, C, H, W) in [0, 1] to the same. Crops are sampled bilinearly; brightness, contrast, saturation and hue
    (a quarter of `jitter`) change in that order, each by its own factor an image. Images that are not RGB keep their colours.
    """

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, channels = images.shape[:2]

        def uniform(low: float, high: float) -> torch.Tensor:
            return (torch.rand(count, generator=generator) * (high - low) + low).to(images.device)

        area, ratio = uniform(*scale), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
        height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
        mirrored = (uniform(0, 1) < 0.5) & mirror
        left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
        place = torch.zeros(count, 2, 3, device=images.device)
        place[:, 0, 0], place[:, 1, 1] = torch.where(mirrored, -width, width), height
        place[:, 0, 2], place[:, 1, 2] = left, top
        grid = F.affine_grid(place, [count, channels, *images.shape[2:]], align_corners=False)
        views = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        if channels != 3:
            return views
        jittered = uniform(0, 1) < 0.8
        factors = [torch.where(jittered, uniform(1 - jitter, 1 + jitter), torch.ones_like(area)) for _ in range(3)]
        turned = torch.where(jittered, uniform(-jitter / 4, jitter / 4), torch.zeros_like(area))
        views = _jitter(views, *(factor[:, None, None, None] for factor in factors), turn=turned)
        return torch.where((uniform(0, 1) < grey)[:, None, None, None], _luminance(views).expand_as(views), views)

    return augment


def _luminance(images: torch.Tensor) -> torch.Tensor:
    return (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _jitter(images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor, *, turn: torch.Tensor) -> torch.Tensor:
    """Change brightness, contrast, saturation by factors (N, 1, 1, 1) and the hue by turns (N,), a turn being the whole circle.

    The hue is turned in YIQ space: that is linear, and close to the turn in HSV for small angles.
    """
    images = (images * brightness).clamp(0, 1)
    mean = _luminance(images).mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 1)
    grey = _luminance(images)
    images = (grey + (images - grey) * saturation).clamp(0, 1)
    to_yiq = images.new_tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    angle = turn * (2 * math.pi)
    rotation = torch.zeros(len(images), 3, 3, device=images.device, dtype=images.dtype)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    turned = torch.linalg.inv(to_yiq) @ rotation @ to_yiq
    return torch.einsum("nij,njhw->nihw", turned, images).clamp(0, 1)


# -- FCT's transformations: each changes what a trigger needs more than what an object is ------------------------------


def rotate(degrees: float = 180.0) -> Augment:
    """Return a rotation of each image by an angle in [-degrees, degrees]: nearest pixel, black outside. uint8 or float (N, C, H, W)."""

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, channels, height, width = images.shape
        angle = ((torch.rand(count, generator=generator) * 2 - 1) * math.radians(degrees)).to(images.device)
        place = torch.zeros(count, 2, 3, device=images.device)
        # Pixels are square, the grid's coordinates are not.
        place[:, 0, 0], place[:, 1, 1] = angle.cos(), angle.cos()
        place[:, 0, 1], place[:, 1, 0] = -angle.sin() * height / width, angle.sin() * width / height
        grid = F.affine_grid(place, [count, channels, height, width], align_corners=False)
        turned = F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
        return turned.to(images.dtype)

    return augment


def translate(share: float = 0.2) -> Augment:
    """Return a shift of each image by whole pixels, up to `share` of its height and width, black outside."""

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, _, height, width = images.shape
        device = images.device

        def source(extent: int) -> torch.Tensor:
            shift = ((torch.rand(count, 1, generator=generator) * 2 - 1) * share * extent).round().long().to(device)
            return torch.arange(extent, device=device) - shift

        rows, columns = source(height), source(width)
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        which = torch.arange(count, device=device)[:, None, None]
        moved = images.permute(0, 2, 3, 1)[which, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
        return moved.permute(0, 3, 1, 2).masked_fill(~inside[:, None], 0)

    return augment


def flip() -> Augment:
    """Return the mirror image of every image."""
    return lambda images, generator: images.flip(3)


def blur(side: int = 15, sigma: tuple[float, float] = (0.1, 2.0)) -> Augment:
    """Return a Gaussian blur with a kernel of `side` pixels and a deviation of its own for each image; the border is reflected."""

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, channels = images.shape[:2]
        spread = (torch.rand(count, 1, generator=generator) * (sigma[1] - sigma[0]) + sigma[0]).to(images.device)
        # An image smaller than the kernel has no border that wide to reflect.
        half = min(side // 2, images.shape[2] - 1, images.shape[3] - 1)
        weights = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=images.device) / spread) ** 2)
        weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)
        flat = F.pad(images.float(), (half,) * 4, mode="reflect").reshape(1, count * channels, *(extent + 2 * half for extent in images.shape[2:]))
        blurred = F.conv2d(flat, weights[:, None, None, :], groups=count * channels)
        blurred = F.conv2d(blurred, weights[:, None, :, None], groups=count * channels).reshape(images.shape)
        return (blurred if images.is_floating_point() else blurred.round().clamp(0, 255)).to(images.dtype)

    return augment


def erase(scale: tuple[float, float] = (0.2, 0.3), ratio: tuple[float, float] = (0.5, 1.0)) -> Augment:
    """Return Random Erasing (Zhong et al., AAAI 2020): one rectangle of noise an image, of a share `scale` of its area and of a side ratio."""

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, _, height, width = images.shape
        area = (torch.rand(count, generator=generator) * (scale[1] - scale[0]) + scale[0]) * height * width
        aspect = torch.rand(count, generator=generator) * (ratio[1] - ratio[0]) + ratio[0]
        inside = []
        for extent, length in ((height, (area * aspect).sqrt()), (width, (area / aspect).sqrt())):
            side = length.round().clamp(1, extent)
            first = (torch.rand(count, generator=generator) * (extent - side + 1)).floor()
            place = torch.arange(extent)
            inside.append((place >= first[:, None]) & (place < (first + side)[:, None]))
        hole = (inside[0][:, :, None] & inside[1][:, None, :])[:, None].to(images.device)
        noise = torch.rand(images.shape, generator=generator).to(images.device)
        return torch.where(hole, noise if images.is_floating_point() else (noise * 255).to(images.dtype), images)

    return augment


TRANSFORMATIONS = {"rotate": rotate(), "affine": translate(), "flip": flip(), "crop": crop_and_flip(mirror=False), "blur": blur(), "erase": erase()}

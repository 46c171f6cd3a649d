"""Augmentation."""

from __future__ import annotations

import pytest
import torch

from core.augment import Augment, crop_and_flip, cutout, simclr
from core.defenses.purify.fine_tuning import FineTuning


def test_crop_and_flip_equals_a_plain_loop() -> None:
    images = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    found = crop_and_flip(2)(images, torch.Generator().manual_seed(8))
    generator = torch.Generator().manual_seed(8)
    top = torch.randint(0, 5, (5, 1), generator=generator)
    left = torch.randint(0, 5, (5, 1), generator=generator)
    mirrored = torch.rand(5, 1, generator=generator) < 0.5
    for index, image in enumerate(images):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        crop = padded[:, int(top[index]) : int(top[index]) + 6, int(left[index]) : int(left[index]) + 7]
        assert torch.equal(found[index], crop.flip(2) if mirrored[index] else crop)
    assert found.dtype == torch.uint8


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (28, 28, 4), (16, 20, 2), (224, 224, 28), (16, 16, 2)])
def test_crops_move_an_image_by_an_eighth_of_its_side(height: int, width: int, padding: int) -> None:
    images = torch.arange(8 * height * width).view(8, 1, height, width).float()

    def view(*given: int) -> torch.Tensor:
        return crop_and_flip(*given)(images, torch.Generator().manual_seed(8))

    assert torch.equal(view(), view(padding))
    assert not torch.equal(view(), view(padding - 1))


def test_nothing_is_mirrored_where_that_was_not_wanted() -> None:
    rising = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)

    def falls(view: Augment, images: torch.Tensor) -> bool:
        found = view(images, torch.Generator().manual_seed(8))[:, :, 4:-4, 4:-4].float()
        # Where a crop ends, padding begins.
        return bool((found[..., -1] < found[..., 0]).any())

    params = FineTuning(method="fine_tuning")
    for view, images in ((params.augmentation(), rising.mul(255).to(torch.uint8)), (simclr(jitter=0, grey=0), rising)):
        assert falls(view, images)
    unmirrored = params.model_copy(update={"mirror": False})
    for view, images in ((unmirrored.augmentation(), rising.mul(255).to(torch.uint8)), (simclr(jitter=0, grey=0, mirror=False), rising)):
        assert not falls(view, images)


def test_views_are_images_and_repeatable() -> None:
    images = torch.rand(16, 3, 32, 32)
    views = simclr()(images, torch.Generator().manual_seed(0))
    assert views.shape == images.shape and views.min() >= 0 and views.max() <= 1
    assert torch.equal(views, simclr()(images, torch.Generator().manual_seed(0)))
    assert (views - images).abs().flatten(1).mean(1).min() > 0.01
    whole = simclr(scale=(1.0, 1.0), jitter=0.0, grey=0.0)(images, torch.Generator().manual_seed(3))
    assert whole.shape == images.shape
    grey = simclr(jitter=0.0, grey=1.0)(images, torch.Generator().manual_seed(0))
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 1], grey[:, 2])
    assert simclr()(torch.rand(4, 1, 16, 16), torch.Generator()).shape == (4, 1, 16, 16)


def test_cutout_makes_one_grey_square() -> None:
    cut = cutout(3)(torch.ones(20, 3, 16, 16), torch.Generator().manual_seed(0))
    changed = (cut != 1).all(1).flatten(1).sum(1)
    assert changed.max() == 9 and changed.min() >= 4 and (cut[cut != 1] == 0.5).all()

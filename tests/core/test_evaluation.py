from __future__ import annotations

import pytest
import torch

from core import evaluation
from core.attacks.badnets import BadNets, stamp
from core.augment import crop_and_flip
from core.images import ImageSet, from_arrays
from tests.core.test_inversion import tiny


def labelled(count: int = 60) -> ImageSet:
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 3)


def test_counts_equal_a_plain_loop() -> None:
    model, test, attack = tiny(), labelled(), BadNets(method="badnets", target=1)
    assert test.labels is not None
    found = evaluation.evaluate(model, test, attack)
    right = hits = kept = excluded = 0
    with torch.no_grad():
        for image, label in zip(test.images, test.labels, strict=True):
            clean = int(model(image[None].float() / 255).argmax())
            right += clean == label
            if label != 1:
                patched = int(model(stamp(image[None], attack).float() / 255).argmax())
                hits += patched == 1
                kept += patched == label
                excluded += clean == label
    assert (found["ba"]["hits"], found["ba"]["n"]) == (right, 60)
    assert (found["asr"]["hits"], found["asr"]["n"]) == (hits, 40)
    assert (found["pa"]["hits"], found["ba_excluding_target"]["hits"]) == (kept, excluded)
    assert found["asr"]["value"] + found["pa"]["value"] <= 1
    assert sum(one["hits"] for one in found["per_class"]) == right


def test_without_an_attack_there_is_no_asr() -> None:
    assert set(evaluation.evaluate(tiny(), labelled())) == {"ba", "per_class"}


def test_wilson_interval() -> None:
    found = evaluation.rate(8, 10)
    assert (found["low"], found["high"]) == (pytest.approx(0.4901625), pytest.approx(0.9433178))
    assert evaluation.rate(0, 0)["value"] is None
    assert evaluation.rate(0, 50)["low"] == pytest.approx(0, abs=1e-12) and evaluation.rate(50, 50)["high"] == pytest.approx(1)


def test_der_limits() -> None:
    def measured(ba: float, asr: float) -> dict[str, dict[str, float]]:
        return {"ba": {"value": ba}, "asr": {"value": asr}}

    assert evaluation.defense_effectiveness(measured(0.9, 1.0), measured(0.9, 1.0)) == 0.5
    assert evaluation.defense_effectiveness(measured(0.9, 1.0), measured(0.9, 0.0)) == 1.0
    assert evaluation.defense_effectiveness(measured(0.9, 1.0), measured(0.8, 0.0)) == pytest.approx(0.95)
    assert evaluation.defense_effectiveness({"ba": {"value": 0.9}}, {"ba": {"value": 0.9}}) is None


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


def test_image_sets_round_trip(tmp_path: object) -> None:
    import numpy as np

    data = from_arrays(np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8), np.array([0, 1, 1, 0]), ("a", "b"))
    data.save(tmp_path)  # type: ignore[arg-type]
    back = ImageSet.load(tmp_path)  # type: ignore[arg-type]
    assert torch.equal(back.images, data.images) and torch.equal(back.labels, data.labels) and back.class_names == ("a", "b")  # type: ignore[arg-type]
    assert back.images.is_contiguous(memory_format=torch.channels_last)

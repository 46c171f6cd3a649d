"""The published model on the real images (only where they are)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from core import evaluation, poisoning, weights
from core.attacks.badnets import BadNets
from core.images import ImageSet
from intake import checkpoint, dataset
from tests.conftest import SHARED

pytestmark = pytest.mark.real_data


def test_the_published_model_scores_what_was_published(tmp_path: Path) -> None:
    checkpoint.take_in(SHARED / "cases/mcldef-wrn16-1-badnets/WRN-16-1-badnet.pth.tar", tmp_path)
    dataset.take_in(SHARED / "data/cifar10/test.zip", tmp_path)
    test = ImageSet.load(tmp_path)
    model, found = weights.identify(weights.read(tmp_path / "model.safetensors"), test)
    assert (found.architecture.name, found.preprocessing.name, found.decided) == ("wrn-16-1", "cifar10", True)

    def triggered(images: ImageSet, **attack: Any) -> poisoning.Triggered:
        trigger = poisoning.declared(BadNets(method="badnets", target=5, **attack), (3, 32, 32), 10)
        return poisoning.triggered(images, trigger, 10)

    found = evaluation.evaluate(model, test, triggered(test))
    counts = {name: found[name]["hits"] for name in ("ba", "ba_excluding_target", "asr", "pa")}
    assert counts == {"ba": 8240, "ba_excluding_target": 7471, "asr": 8968, "pa": 31}
    # Orientation and place matter: mirrored, moved one pixel up and left, a full checkerboard, all white.
    others = {
        "mirrored": {"cells": [[255, 0, 0], [0, 255, 0], [255, 0, 255]]},
        "moved": {"bottom": 1, "right": 1},
        "checker": {"pattern": "checker"},
        "white": {"pattern": "white"},
    }
    some = test.subset(torch.arange(0, len(test), 4))
    rates = {name: 100 * float((evaluation.predict(model, triggered(some, **attack).images) == 5).double().mean()) for name, attack in others.items()}
    assert rates == pytest.approx({"mirrored": 42.99, "moved": 24.2, "checker": 87.08, "white": 3.06}, abs=2)


def test_wrong_preprocessing_scores_less_consistent(tmp_path: Path) -> None:
    with zipfile.ZipFile(SHARED / "data/cifar10/test.zip") as source, zipfile.ZipFile(tmp_path / "some.zip", "w") as out:
        for name in [name for name in source.namelist() if name.endswith(".webp")][::20]:
            out.writestr(name, source.read(name))
    checkpoint.take_in(SHARED / "cases/mcldef-wrn16-1-badnets/WRN-16-1-badnet.pth.tar", tmp_path)
    dataset.take_in(tmp_path / "some.zip", tmp_path)
    _, found = weights.identify(weights.read(tmp_path / "model.safetensors"), ImageSet.load(tmp_path))
    scores = {name: score for _, name, score in found.scores}
    assert scores["cifar10"] == pytest.approx(0.0061, abs=0.002)
    assert scores["cifar10-247"] == pytest.approx(0.067, abs=0.01)
    assert scores["unit"] == pytest.approx(3.40, abs=0.2)

"""Every attack, by walking the catalogue: what it changes, that a recipe rebuilds it, and each paper's own facts."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core import adversarial, catalog, poisoning, triggers, victim, weights
from core.attacks.badnets import BadNets
from core.attacks.blend import Blend, stripes
from core.attacks.bpp import Bpp
from core.attacks.label_consistent import LabelConsistent
from core.attacks.sig import Sig
from core.attacks.smooth import Smooth
from core.attacks.trojan import Trojan
from core.attacks.wanet import WaNet
from core.classifier import Classifier
from core.errors import BadRecipe
from core.images import ImageSet
from core.poisoning import AttackParams, Recipe
from core.run import Run
from tests.core.untrained import noise

SHAPE = (3, 32, 32)
FITTED = sorted(name for name, attack in catalog.attacks().items() if attack.fit is not None)
DRAWN = sorted(set(catalog.attacks()) - set(FITTED))
# Budgets that end at once, for what is not about how good the trigger is.
SMALL: dict[str, dict[str, Any]] = {
    "label_consistent": {"steps": 2},
    "ssba": {"images": 64, "epochs": 1},
    "input_aware": {"images": 64, "epochs": 1, "mask_epochs": 1, "batch_size": 32},
    "latent": {"rounds": 1},
    "adaptive_patch": {"epochs": 1, "batch_size": 32, "count": 20},
    "wanet": {"count": 20, "cross_ratio": 1},
    "chessboard": {"count": 20},
}


def params(name: str, **more: Any) -> AttackParams:
    made = catalog.attacks()[name].params(method=name, **{"target": 1, **SMALL.get(name, {}), **more})
    assert isinstance(made, AttackParams)
    return made


@pytest.fixture(scope="module")
def surrogate() -> Classifier:
    recipe = victim.Recipe(epochs=1, batch_size=32, rate=0.05, schedule="one_cycle")
    return victim.train(Run(device="cpu"), noise(), architecture="wrn-10-1", preprocessing=weights.PREPROCESSINGS[0], recipe=recipe)


@pytest.mark.parametrize("name", catalog.attacks())
def test_an_attack_changes_what_its_mask_says_and_its_recipe_rebuilds_it(name: str, surrogate: Classifier, tmp_path: Path) -> None:
    train, test = noise(), noise(90)
    recipe = poisoning.plan(Run(device="cpu"), params(name), train, surrogate)
    recipe.save(tmp_path / "recipe.safetensors")
    made = poisoning.poison(train, recipe)

    mask = recipe.trigger.assets["mask"]
    stamped = recipe.trigger.stamp(test.images)
    changed = (stamped != test.images).any(0)
    assert mask.shape == SHAPE and mask.dtype == torch.bool
    assert not (changed & ~mask).any()
    # Networks may paint anywhere; after a moment's training they do not yet paint everywhere.
    if name not in ("ssba", "input_aware"):
        assert torch.equal(changed, mask)
    assert stamped.dtype == torch.uint8 and not torch.equal(stamped, test.images)

    different = (made.data.images != train.images).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert set(different) <= {*recipe.chosen.tolist(), *recipe.disturbed.tolist()}
    assert train.labels is not None and made.is_poisoned.sum() == len(recipe.chosen)
    assert torch.equal(made.original, train.labels)
    counts = recipe.counts(train.labels)
    assert counts["n_poisoned"] == len(recipe.chosen) and counts["n_disturbed"] == len(recipe.disturbed)
    assert counts["n_relabelled"] == (0 if made.data.labels is None else int((made.data.labels != train.labels).sum()))
    if recipe.trigger.params.labels == "none":
        assert made.data.labels is None
    else:
        assert made.data.labels is not None
        assert (made.data.labels[recipe.chosen] == 1).all()
        assert torch.equal(made.data.labels[recipe.disturbed], train.labels[recipe.disturbed])

    made.save(tmp_path / "poisoned")
    assert torch.equal(ImageSet.load(tmp_path / "poisoned" / "data").images, made.data.images)
    assert torch.equal(load_file(tmp_path / "poisoned" / "truth.safetensors")["chosen"], recipe.chosen)

    again = Recipe.load(tmp_path / "recipe.safetensors")
    assert poisoning.digest(poisoning.poison(train, again).data) == again.poisoned == recipe.poisoned
    assert torch.equal(again.trigger.stamp(test.images), stamped)
    # Whatever pieces the images come in.
    assert torch.equal(torch.cat([again.trigger.stamp(test.images[:7]), again.trigger.stamp(test.images[7:])]), stamped)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "recipe.safetensors").read_bytes()


# SHA-256 of the poisoned set and of the triggered images, written down once: every machine must make the same bytes.
KNOWN = {
    "badnets": ("21a7ebaf10df14c0", "8d31f130946f9286"),
    "blend": ("31b2b44039672470", "64cd7f48782dbc4f"),
    "bpp": ("cf290d75570b368b", "5f5a02b2ab016201"),
    "chessboard": ("4e7c4ce091121083", "1e6185264b902523"),
    "l0_invisible": ("d8bfb9202120dc7a", "5688f15412bbdf6c"),
    "l2_invisible": ("934c5d5e72cbe071", "99df9d3e4f20fa9d"),
    "low_frequency": ("4e69a7948a19f58a", "be68a9650d825782"),
    "sig": ("b92768ec4192ada4", "b994f87be2147e0d"),
    "smooth": ("b69a0284fc147763", "fd6c1395c94709c6"),
    "ssl_backbone": ("ad3f1fbe20f37493", "3b1e1f29d2f1e6f9"),
    "trojan": ("7e69320148f89047", "21aa068fffc341c7"),
    "wanet": ("30a8097c0dcae860", "3fd5da3c57d3d194"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_bytes_on_every_machine(name: str) -> None:
    train = noise()
    recipe = poisoning.plan(Run(device="cpu"), params(name), train)
    stamped = recipe.trigger.stamp(train.images).permute(0, 2, 3, 1).contiguous().numpy()
    assert (recipe.poisoned[:16], hashlib.sha256(stamped.tobytes()).hexdigest()[:16]) == KNOWN[name]


def test_a_recipe_belongs_to_its_images_and_is_not_altered(tmp_path: Path) -> None:
    train = noise()
    recipe = poisoning.plan(Run(device="cpu"), params("badnets"), train)
    with pytest.raises(BadRecipe, match="not the one"):
        poisoning.poison(noise(80), recipe)
    with pytest.raises(BadRecipe, match="the trigger is for images of"):
        recipe.trigger.stamp(train.images[:, :, :16, :16])
    recipe.trigger.assets["pattern"][0, 31, 31] = 7  # type: ignore[index]
    path = tmp_path / "recipe.safetensors"
    recipe.save(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BadRecipe, match=r"recorded SHA-256|not a recipe"):
        Recipe.load(path)
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(BadRecipe, match="not a recipe"):
        Recipe.load(tmp_path / "other")


# -- which images: S1 to S8 --------------------------------------------------------------------------------------------


CIFAR = torch.arange(50_000) % 10


@pytest.mark.parametrize(
    ("rule", "more", "count", "where"),
    [
        ("S1", {}, 5000, "all"),
        ("S2", {}, 4500, "others"),
        ("S3", {"labels": "clean"}, 500, "own"),
        ("S4", {"labels": "all_to_all"}, 5000, "all"),
        ("S6", {}, 5000, "others"),
        ("S6", {"labels": "clean"}, 4750, "own"),
        ("S7", {"count": 1000}, 1000, "others"),
        ("S8", {"rate": 0.06}, 3000, "others"),
        ("S8", {"rate": 0.06, "include_target": True}, 3000, "all"),
        ("S8", {"rate": 0.06, "labels": "clean"}, 3000, "own"),
        ("S8", {"rate": 0.06, "labels": "none"}, 3000, "own"),
    ],
)
def test_sampling_rules_have_the_published_counts(rule: str, more: dict[str, Any], count: int, where: str) -> None:
    chosen = poisoning.select(CIFAR, params("badnets", sampling=rule, **more))
    # The last 5 % of a seeded order are left alone by S6, so its clean-label count varies a little with the seed.
    assert abs(len(chosen) - count) <= (60 if count == 4750 else 0)
    assert len(chosen.unique()) == len(chosen) and torch.equal(chosen, chosen.sort().values)
    own = int((CIFAR[chosen] == 1).sum())
    assert {"own": own == len(chosen), "others": own == 0, "all": 0 < own < len(chosen)}[where]
    again = poisoning.select(CIFAR, params("badnets", sampling=rule, seed=1, **more))
    assert not torch.equal(again, chosen)


def test_s5_is_a_coin_for_every_target_image() -> None:
    chosen = poisoning.select(CIFAR, params("badnets", sampling="S5", labels="clean"))
    assert (CIFAR[chosen] == 1).all()
    # 5000 coins of 0.8: five standard deviations.
    assert abs(len(chosen) - 4000) < 5 * math.sqrt(5000 * 0.8 * 0.2)


def test_s6_without_shuffling_takes_the_first_files() -> None:
    chosen = poisoning.select(CIFAR, params("badnets", sampling="S6", shuffle=False))
    assert torch.equal(chosen, (CIFAR != 1).nonzero()[:5000, 0])


@pytest.mark.parametrize("classes", [4, 43, 100])
def test_all_to_all_wraps_at_the_number_of_classes(classes: int) -> None:
    trigger = poisoning.declared(params("badnets", labels="all_to_all", sampling="S4"), SHAPE, classes)
    labels = torch.arange(classes)
    assert trigger.wanted(labels, classes).tolist() == [*range(1, classes), 0]


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("badnets", {"bottom": 30}, "lies outside"),
        ("badnets", {"size": 40, "pattern": "white"}, "lies outside"),
        ("badnets", {"cells": [[1], [1, 2]]}, "differ in length"),
        ("badnets", {"target": 4}, "not one of the 4 classes"),
        ("badnets", {"rate": 0.001}, "poisons no image at all"),
        ("badnets", {"sampling": "S7", "count": 91}, "finds 90"),
        ("badnets", {"labels": "clean", "sampling": "S8", "rate": 0.5}, "would poison 60 images, but S8 finds 30 in class 1"),
        ("badnets", {"labels": "clean"}, "S1 draws from all classes"),
        ("badnets", {"sampling": "S3"}, "draws from the target class"),
        ("label_consistent", {"layout": "centre", "sampling": "S2"}, "only the target class may carry"),
        ("wanet", {"cross_ratio": 6}, "to disturb"),
        ("latent", {"size": 1.0}, "lies outside"),
        ("latent", {"layer": "block9"}, "no module 'block9'"),
        ("adaptive_patch", {"size": 33}, "lies outside"),
        ("l0_invisible", {"pixels": 33}, "do not fit"),
        ("trojan", {"picture": [[1, 2]]}, "the images are"),
        ("blend", {"picture": [[1, 2]]}, "the images are"),
        ("blend", {"mask": [[1, 2]]}, "the images are"),
        ("badnets", {"scale": 512, "cells": [[0] * 512] * 512}, "lies outside"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_made(name: str, more: dict[str, Any], words: str, surrogate: Classifier) -> None:
    with pytest.raises(BadRecipe, match=words) as caught:
        poisoning.plan(Run(device="cpu"), params(name, **more), noise(), surrogate)
    assert caught.value.advice


@pytest.mark.parametrize(
    "bad",
    [
        {"target": -1},
        {"target": True},
        {"target": "1"},
        {"rate": 1.5},
        {"rate": 0},
        {"pattern": "stripes"},
        {"cells": [[256]]},
        {"cells": [[]]},
        {"surprise": 3},
    ],
)
def test_bad_parameters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        catalog.validate(catalog.attacks(), {"method": "badnets", "target": 0, **bad})


def test_attacks_that_need_a_surrogate_or_training_say_so() -> None:
    with pytest.raises(BadRecipe, match="needs a surrogate"):
        poisoning.plan(Run(device="cpu"), params("label_consistent"), noise())
    with pytest.raises(BadRecipe, match="has to be trained"):
        poisoning.declared(params("ssba"), SHAPE, 4)


# -- what the papers and their code say of single attacks --------------------------------------------------------------


def stamp(made: AttackParams, images: torch.Tensor) -> torch.Tensor:
    return poisoning.declared(made, tuple(images.shape[1:]), 10).stamp(images)  # type: ignore[arg-type]


def test_badnets_grid_on_black() -> None:
    stamped = stamp(BadNets(method="badnets", target=0), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    white = {(int(row), int(column)) for row, column in (stamped[0, 0] == 255).nonzero()}
    assert white == {(7, 7), (7, 5), (6, 6), (5, 7)}
    assert torch.equal(stamped[0, 0], stamped[0, 2])


def test_badnets_elsewhere_and_own_cells() -> None:
    images = torch.full((2, 1, 6, 6), 9, dtype=torch.uint8)
    stamped = stamp(BadNets(method="badnets", target=0, cells=[[1, 2]], bottom=1, right=3), images)
    assert stamped[0, 0, 4].tolist() == [9, 1, 2, 9, 9, 9]
    assert int((stamped != images).sum()) == 4
    assert images.unique().tolist() == [9]
    colour = stamp(BadNets(method="badnets", target=0, cells=[[[1, 2, 3]]], top=0, left=2), torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert colour[0, :, 0, 2].tolist() == [1, 2, 3] and int((colour != 0).sum()) == 3
    centre = stamp(BadNets(method="badnets", target=0, place="centre"), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert set(centre[0, 0].nonzero()[:, 0].tolist()) == {14, 15, 16}
    blocks = stamp(BadNets(method="badnets", target=0, scale=10, top=32, left=32), torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    assert int((blocks[0, 0] == 255).sum()) == 400


def test_signal_mask_and_strip_blend() -> None:
    row = "0 14 19 13 255 241 237 244 2 15 19 11 253 240 237 246 4 17 19 9 251 239 238 248 6 18 18 7 249 238 238 250"
    assert stripes(32).tolist() == [int(value) for value in row.split()]
    assert int(np.broadcast_to(stripes(32), (32, 32)).astype(int).sum()) == 131_040
    assert hashlib.sha256(np.broadcast_to(stripes(32), (32, 32)).tobytes()).hexdigest().startswith("4e7c567a07f970fa")
    blended = stamp(Blend(method="blend", target=0, pattern="strip"), torch.full((1, 3, 32, 32), 100, dtype=torch.uint8))
    assert set(blended.unique().tolist()) <= {80, 81, 82, 83, *range(127, 132)}


def test_blend_is_a_truncated_mix() -> None:
    images = noise(6).images
    made = poisoning.declared(Blend(method="blend", target=0, pattern="patch", seed=4), SHAPE, 10)
    pattern, weight = made.assets["pattern"].numpy(), made.assets["weight"].numpy()
    assert set(np.unique(weight)) == {0.0, 0.4} and (weight > 0).sum() == 27
    expected = ((1 - weight) * images.numpy().astype(float) + weight * pattern).astype(np.uint8)
    assert np.array_equal(made.stamp(images).numpy(), expected)


def test_own_picture_under_an_own_mask() -> None:
    images = noise(6).images
    picture, mask = [[200] * 32] * 32, [[255] * 16 + [0] * 16] * 31 + [[51] * 32]
    stamped = stamp(Blend(method="blend", target=0, picture=picture, mask=mask, alpha=0.5), images)
    assert torch.equal(stamped[..., :31, 16:], images[..., :31, 16:])
    assert torch.equal(stamped[..., :31, :16], (images[..., :31, :16].double() * 0.5 + 100).to(torch.uint8))
    weight = 0.5 * (51 / 255)
    assert torch.equal(stamped[..., 31, :], (images[..., 31, :].double() * (1 - weight) + 200 * weight).to(torch.uint8))


@pytest.mark.parametrize(
    ("value", "mode", "found"), [(505.9, "wrap", 249), (-3.2, "wrap", 253), (505.9, "saturate", 255), (-3.2, "saturate", 0), (7.9, "trunc", 7)]
)
def test_quantisation(value: float, mode: Any, found: int) -> None:
    assert int(triggers.quantise(torch.tensor([value]), mode)) == found


def test_trojan_wraps_or_saturates() -> None:
    images = torch.full((1, 3, 32, 32), 250, dtype=torch.uint8)
    own = [[250] * 32] * 32
    assert stamp(Trojan(method="trojan", target=0, picture=own), images).unique().tolist() == [244]
    assert stamp(Trojan(method="trojan", target=0, picture=own, quantise="saturate"), images).unique().tolist() == [255]
    rows = poisoning.declared(Trojan(method="trojan", target=0), SHAPE, 10).assets["mask"].nonzero()
    assert set(rows[:, 1].tolist()) == set(rows[:, 2].tolist()) == {25, 26, 27}


def test_sig_is_a_sinusoid_over_columns() -> None:
    images = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    changed = stamp(Sig(method="sig", target=0), images).int() - 100
    assert int(changed[..., 0].abs().max()) == 0 and int(changed.abs().max()) <= 20
    wave = np.floor(np.round(20 * np.sin(2 * np.pi * np.arange(32) * 6 / 32), 9))
    assert np.array_equal(changed[0, 0, 5].numpy(), wave)
    # Period 16/3 pixels: sixteen columns on, it repeats.
    assert torch.equal(changed[..., :16], changed[..., 16:])
    recipe = poisoning.declared(Sig(method="sig", target=0, amplitude=40, test_amplitude=60), SHAPE, 10)
    assert int((recipe.stamp(images).int() - 100).max()) == 60 and int((recipe.poison(images).int() - 100).max()) == 40


def test_chessboard_adds_three_to_every_other_pixel() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(1, 3, 32, 32)
    changed = stamp(params("chessboard"), images).int() - images.int()
    white = (torch.arange(32)[:, None] + torch.arange(32)) % 2 == 0
    assert int(white.sum()) == 512
    assert torch.equal(changed, torch.where(white, (255 - images.int()).clamp(max=3), 0))


def test_wanet_warp() -> None:
    made = poisoning.declared(WaNet(method="wanet", target=0), SHAPE, 10)
    images = noise(4).images
    rows, columns = triggers.fixed_point(triggers.identity_grid(32, 32))
    assert torch.equal(triggers.warp(images, rows, columns), images)
    grid = torch.stack((made.assets["columns"], made.assets["rows"]), -1).double() / (1 << triggers.BITS) / 31 * 2 - 1
    expected = torch.nn.functional.grid_sample(images.double(), grid.expand(4, -1, -1, -1), align_corners=True, padding_mode="zeros")
    assert (made.stamp(images).double() - expected).abs().max() <= 0.5 + 1e-6
    moved = (made.assets["rows"] - rows).double() / (1 << triggers.BITS)
    assert 0.05 < moved.abs().mean() < 0.6


def test_smooth_stretches_every_image() -> None:
    stamped = stamp(Smooth(method="smooth", target=0), noise(9).images)
    assert (stamped.amin((1, 2, 3)) == 0).all() and (stamped.amax((1, 2, 3)) == 255).all()


def test_bpp_equals_floyd_and_steinberg_on_one_image() -> None:
    image = noise(1).images
    found = stamp(Bpp(method="bpp", target=0), image)[0].numpy()
    step = 255 / 7
    for channel in range(3):
        values = image[0, channel].double().numpy().copy()
        for row in range(32):
            for column in range(32):
                old = min(max(values[row, column], 0), 255)
                new = float(np.round(old / step)) * step
                values[row, column] = new
                for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                    if row + down < 32 and 0 <= column + right < 32:
                        values[row + down, column + right] += (old - new) * (share / 16)
        assert np.array_equal(found[channel], np.round(values).astype(np.uint8))
    assert len(np.unique(found)) <= 8
    assert set(np.unique(stamp(Bpp(method="bpp", target=0, dither=False), image).numpy())) <= {round(level * step) for level in range(8)}


def test_label_consistent_shows_only_the_patch_at_test(surrogate: Classifier) -> None:
    made = LabelConsistent(method="label_consistent", target=1, layout="four_corners", steps=3)
    train = noise()
    recipe = poisoning.plan(Run(device="cpu"), made, train, surrogate)
    stamped = recipe.trigger.stamp(train.images)
    changed = (stamped != train.images).any(0)
    assert torch.equal(changed, recipe.trigger.assets["mask"]) and int(changed.sum()) == 4 * 9 * 3
    # Symmetric, so that mirrored images carry it too.
    assert torch.equal(recipe.trigger.assets["pattern"], recipe.trigger.assets["pattern"].flip(2))
    base = recipe.trigger.assets["adversarial"].int() - train.images[recipe.chosen].int()
    assert 0 < int(base.abs().max()) <= 8


def test_pgd_stays_within_epsilon_and_raises_the_loss(surrogate: Classifier) -> None:
    data = noise(32)
    assert data.labels is not None
    images, model = data.images.float() / 255, surrogate.frozen_copy()
    moved = adversarial.pgd(model, images, data.labels, epsilon=8 / 255, step=2 / 255, steps=5)
    assert (moved - images).abs().max() <= 8 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    loss = torch.nn.functional.cross_entropy
    assert loss(model(moved), data.labels) > loss(model(images), data.labels)


def test_a_fitted_trigger_goes_on_where_it_was_stopped(surrogate: Classifier, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    train, made = noise(), params("label_consistent", steps=1, labels="clean", sampling="S8", rate=0.2)
    whole = poisoning.plan(Run(device="cpu"), made, train, surrogate)

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "checkpoint":
            raise Stop

    with pytest.raises(Stop):
        poisoning.plan(Run(device="cpu", folder=tmp_path, checkpoint_seconds=0, emit=emit), made, train, surrogate)
    assert poisoning.plan(Run(device="cpu", folder=tmp_path), made, train, surrogate).poisoned == whole.poisoned


def test_training_a_victim_learns_and_depends_on_the_seed_alone() -> None:
    images = torch.zeros(96, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(96) % 3
    for label in range(3):
        images[labels == label, label] = 200
    data = ImageSet(images.contiguous(memory_format=torch.channels_last), labels, ("r", "g", "b"))
    recipe = victim.Recipe(epochs=4, batch_size=16, rate=0.05, schedule="cosine", optimizer="sgd")

    def trained(seed: int) -> Classifier:
        return victim.train(Run(seed=seed, device="cpu"), data, architecture="wrn-10-1", preprocessing=weights.PREPROCESSINGS[2], recipe=recipe)

    first, again, other = trained(0), trained(0), trained(1)
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)]
    assert all(same) and not torch.equal(first.head.weight, other.head.weight)
    with torch.no_grad():
        assert (first(images.float() / 255).argmax(1) == labels).float().mean() > 0.9
    assert victim.shortened(victim.RECIPES["mcldef"], 10).marks == ((0, 0.1), (4, 0.01), (7, 0.001))

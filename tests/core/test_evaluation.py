from __future__ import annotations

import pytest
import torch

from core import evaluation, poisoning
from core.attacks.badnets import BadNets
from core.errors import OutputsNotFinite
from core.images import ImageSet, at_once, from_arrays
from tests.core.untrained import some_images, tiny


def labelled(count: int = 60) -> ImageSet:
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 3)


def test_counts_equal_a_plain_loop() -> None:
    model, test, attack = tiny(), labelled(), BadNets(method="badnets", target=1)
    assert test.labels is not None
    trigger = poisoning.declared(attack, (3, 8, 8), 3)
    found = evaluation.evaluate(model, test, poisoning.triggered(test, trigger, 3))
    right = hits = kept = excluded = mistaken = 0
    with torch.no_grad():
        for image, label in zip(test.images, test.labels, strict=True):
            clean = int(model(image[None].float() / 255).argmax())
            right += clean == label
            if label != 1:
                patched = int(model(trigger.stamp(image[None]).float() / 255).argmax())
                hits += patched == 1
                kept += patched == label
                excluded += clean == label
                mistaken += clean == 1
    assert (found["ba"]["hits"], found["ba"]["n"]) == (right, 60)
    assert (found["asr"]["hits"], found["asr"]["n"]) == (hits, 40)
    assert (found["pa"]["hits"], found["ba_excluding_target"]["hits"]) == (kept, excluded)
    assert (found["asr_without_trigger"]["hits"], found["asr_without_trigger"]["n"]) == (mistaken, 40)
    assert found["asr"]["value"] + found["pa"]["value"] <= 1
    assert sum(one["hits"] for one in found["per_class"]) == right


def test_all_to_all_counts_every_image() -> None:
    model, test = tiny(), labelled()
    assert test.labels is not None
    attack = BadNets(method="badnets", target=0, labels="all_to_all", sampling="S4")
    trigger = poisoning.declared(attack, (3, 8, 8), 3)
    found = evaluation.evaluate(model, test, poisoning.triggered(test, trigger, 3))
    with torch.no_grad():
        predicted = model(trigger.stamp(test.images).float() / 255).argmax(1)
    assert (found["asr"]["hits"], found["asr"]["n"]) == (int((predicted == (test.labels + 1) % 3).sum()), 60)
    assert found["pa"]["hits"] == int((predicted == test.labels).sum())
    assert "ba_excluding_target" not in found


def test_given_triggered_images_count_like_made_ones() -> None:
    model, test = tiny(), labelled()
    trigger = poisoning.declared(BadNets(method="badnets", target=1), (3, 8, 8), 3)
    whole = ImageSet(trigger.stamp(test.images), test.labels)
    assert evaluation.evaluate(model, test, poisoning.given(whole, 1, 3)) == evaluation.evaluate(model, test, poisoning.triggered(test, trigger, 3))


def test_precision_recall_and_filter_rates_equal_plain_counts() -> None:
    generator = torch.Generator().manual_seed(1)
    poisoned, clean, suspect = (torch.rand(50, generator=generator) < share for share in (0.2, 0.5, 0.3))
    found = evaluation.split_precision(poisoned, clean, suspect)
    rows = list(zip(poisoned.tolist(), clean.tolist(), suspect.tolist(), strict=True))
    assert found["clean_precision"]["hits"] == sum(c and not p for p, c, _ in rows) and found["clean_precision"]["n"] == sum(c for _, c, _ in rows)
    assert found["poison_precision"]["hits"] == sum(s and p for p, _, s in rows) and found["poison_precision"]["n"] == sum(s for *_, s in rows)
    assert found["clean_recall"]["n"] == sum(not p for p, *_ in rows) and found["poison_recall"]["n"] == sum(p for p, *_ in rows)
    rates = evaluation.filter_rates(poisoned, clean)
    assert rates["poisoned_accepted"]["hits"] == sum(p and c for p, c, _ in rows)
    assert rates["clean_accepted"]["hits"] == found["clean_recall"]["hits"]
    assert evaluation.split_precision(poisoned, torch.zeros(50), suspect)["clean_precision"]["value"] is None


def test_without_an_attack_there_is_no_asr() -> None:
    assert set(evaluation.evaluate(tiny(), labelled())) == {"ba", "per_class"}


def test_images_whose_logits_are_not_finite_have_no_class() -> None:
    broken, images = tiny(), some_images().images
    assert evaluation.predict(broken, images[:0]).tolist() == []
    with torch.no_grad():
        broken.head.weight.fill_(3e38)
    with pytest.raises(OutputsNotFinite, match="of 8 images"):
        evaluation.predict(broken, images)


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


def test_large_images_go_through_a_network_in_smaller_parts() -> None:
    assert [at_once(values, 500) for values in (0, 3 * 32 * 32, 3 * 224 * 224, 1 << 40)] == [500, 500, 55, 1]


def test_image_sets_round_trip(tmp_path: object) -> None:
    import numpy as np

    data = from_arrays(np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8), np.array([0, 1, 1, 0]), ("a", "b"))
    data.save(tmp_path)  # type: ignore[arg-type]
    back = ImageSet.load(tmp_path)  # type: ignore[arg-type]
    assert torch.equal(back.images, data.images) and torch.equal(back.labels, data.labels) and back.class_names == ("a", "b")  # type: ignore[arg-type]
    assert back.images.is_contiguous(memory_format=torch.channels_last)

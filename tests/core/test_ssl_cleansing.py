"""SSL cleansing: votes and energies against the naive ones, its filters and its encoder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import digits
from core import encoders, training
from core import split as splits
from core.attacks.badnets import BadNets
from core.defenses.cleanse import ssl_cleanse
from core.defenses.cleanse.ssl_cleanse import SSLCleanse, judge
from core.neighbours import Neighbourhood, neighbourhood
from core.run import Run
from tests.core.test_activations import contaminated


def embedding(count: int = 200, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return F.normalize(torch.randn(count, width, generator=generator) + F.one_hot(labels, width), dim=1), labels


def slowly(features: torch.Tensor, labels: torch.Tensor, k: int, tau: float) -> tuple[list[list[int]], list[list[float]]]:
    votes, energies = [], []
    z = features.double()
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        nearest = sorted(others, key=lambda j: -float(z[i] @ z[j]))[:k]
        votes.append([sum(int(labels[j]) == c for j in nearest) for c in range(4)])
        pull = {j: math.exp(float(z[i] @ z[j]) / tau) for j in others}
        total = sum(pull.values())
        members = [[j for j in others if int(labels[j]) == c] for c in range(4)]
        energies.append([math.log(sum(pull[j] for j in mine) / len(mine) / total) for mine in members])
    return votes, energies


@pytest.mark.parametrize("block", [7, 64, 500])
def test_votes_and_energies_are_the_naive_ones_whatever_the_block(block: int) -> None:
    features, labels = embedding()
    near = neighbourhood(Run(device="cpu"), "near", features, labels, 4, k=20, temperature=0.3, block=block)
    votes, energies = slowly(features, labels, 20, 0.3)
    assert near.votes.tolist() == votes
    assert torch.allclose(near.energies.double(), torch.tensor(energies, dtype=torch.float64), atol=1e-5)
    # The class sums are the whole sum: sum_c n_c(i) exp(S_c(i)) = 1.
    sizes = torch.bincount(labels, minlength=4)[None] - F.one_hot(labels, 4)
    assert torch.allclose((sizes * near.energies.exp()).sum(1), torch.ones(200), atol=1e-5)


def test_ties_go_to_the_nearer_label_and_then_to_the_smaller_index() -> None:
    votes = torch.tensor([[2, 2, 0], [1, 2, 1], [2, 2, 2]])
    near = Neighbourhood(votes, torch.tensor([[0.5, 0.9, 0.0], [3.0, 0.1, 0.1], [0.4, 0.4, 0.4]]), torch.zeros(3, 3))
    elected, share = near.elected()
    assert elected.tolist() == [1, 1, 0] and share.tolist() == pytest.approx([0.5, 0.5, 1 / 3])


def test_neighbours_of_one_label_accept_everything() -> None:
    labels = torch.arange(3).repeat_interleave(20)
    features = F.normalize(F.one_hot(labels, 3).float() + 0.01 * torch.rand(60, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    near = neighbourhood(Run(device="cpu"), "near", features, labels, 3, k=19)
    elected, share = near.elected()
    assert torch.equal(elected, labels) and bool((share == 1).all())
    split, _ = judge(near, labels, SSLCleanse(method="ssl_cleanse"))
    assert bool(split.kept.all()) and torch.equal(split.labels, labels) and bool((split.scores == 0).all())


def test_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    features, labels = embedding()
    wanted = neighbourhood(Run(device="cpu"), "near", features, labels, 4, k=20, block=20)
    run = Run(device="cpu", folder=tmp_path, config="c", checkpoint_seconds=0)
    run.stopping = True
    from core.errors import Cancelled

    with pytest.raises(Cancelled):
        neighbourhood(run, "near", features, labels, 4, k=20, block=20)
    again = neighbourhood(Run(device="cpu", folder=tmp_path, config="c"), "near", features, labels, 4, k=20, block=20)
    assert torch.equal(again.votes, wanted.votes) and torch.equal(again.energies, wanted.energies)


@pytest.mark.parametrize(("k", "temperature"), [(0, 0.5), (200, 0.5), (5, 0.01)])
def test_senseless_comparisons_are_refused(k: int, temperature: float) -> None:
    features, labels = embedding()
    with pytest.raises(ValueError, match=r"neighbours|temperature"):
        neighbourhood(Run(device="cpu"), "near", features, labels, 4, k=k, temperature=temperature)


def opinion(accepted: list[float], rejected: list[float]) -> tuple[Neighbourhood, torch.Tensor]:
    """Images of class 0 whose elected class is 0 (accepted) or 1, with these shares of 1000 votes."""
    shares = torch.tensor(accepted + rejected)
    first = torch.tensor([True] * len(accepted) + [False] * len(rejected))
    high, low = (shares * 1000).round().long(), (1000 - shares * 1000).round().long()
    votes = torch.stack([torch.where(first, high, low), torch.where(first, low, high)], 1)
    return Neighbourhood(votes, votes.float(), votes.float().div(1000).log()), torch.zeros(len(shares), dtype=torch.int64)


def test_surely_wrong_labels_are_corrected_and_doubtful_images_dropped() -> None:
    # The 80th percentile of 0.501 … 0.600 is 0.5802, by linear interpolation.
    near, labels = opinion([0.5 + step / 1000 for step in range(1, 101)], [0.580, 0.581, 0.6])
    split, found = judge(near, labels, SSLCleanse(method="ssl_cleanse"))
    assert found["thresholds"]["knn"] == pytest.approx(0.5802)  # type: ignore[index]
    assert bool(split.kept[:100].all()) and split.kept[100:].tolist() == [False, True, True]
    assert split.labels[100:].tolist() == [0, 1, 1] and bool(split.suspect[100:].all()) and not bool(split.clean[100:].any())
    split, _ = judge(near, labels, SSLCleanse(method="ssl_cleanse", relabel=False))
    assert split.kept[100:].tolist() == [False, False, False] and torch.equal(split.labels, labels)


def test_both_filters_must_agree() -> None:
    votes = torch.tensor([[9, 1, 0], [1, 9, 0], [9, 1, 0], [1, 9, 0], [1, 9, 0]])
    energies = torch.tensor([[9.0, 1, 0], [9.0, 1, 0], [1.0, 9, 0], [1.0, 9, 0], [1.0, 0, 9]])
    near = Neighbourhood(votes, votes.float(), energies)
    split, _ = judge(near, torch.zeros(5, dtype=torch.int64), SSLCleanse(method="ssl_cleanse", filter="both", percentile=0, relabel=True))
    assert split.clean.tolist() == [True, False, False, False, False]
    # Corrected only where both are sure of the same other class; surer than the only accepted image none of them is.
    assert split.kept.tolist() == [True, False, False, False, False]


def test_a_label_among_strangers_is_poison_and_one_among_its_like_is_not() -> None:
    # Classes 0 and 1 are taken for each other; images of all classes carry label 3.
    looks = torch.arange(4).repeat_interleave(100)
    labels = looks.clone()
    labels[:30], labels[100:130] = 1, 0
    assert splits.shares_among_strangers(labels, looks, 4) == pytest.approx([0.0, 0.0, 0.0, 0.0])
    labels[90:100] = labels[190:200] = labels[290:300] = 3
    assert splits.shares_among_strangers(labels, looks, 4) == pytest.approx([0.0, 0.0, 0.0, 0.1])


def test_labels_that_move_from_every_class_to_the_next_do_not_acquit_a_set() -> None:
    looks = torch.arange(10).repeat_interleave(100)
    for share, verdict in ((0, "no_evidence"), (3, "no_evidence"), (10, "inconclusive")):
        moved = torch.arange(1000) % 100 < share
        labels = torch.where(moved, (looks + 1) % 10, looks)
        found, evidence, target = splits.among_strangers(labels, looks, ~moved, 10, judge="encoder")
        assert (found, target) == (verdict, None) and ("every class holds images, 10.0% or more" in evidence) == (share == 10)
    # Two classes that are alike are no attack.
    labels = torch.where((looks == 3) & (torch.arange(1000) % 4 == 0), 5, looks)
    assert splits.among_strangers(labels, looks, labels == looks, 10, judge="encoder")[0] == "no_evidence"


def test_images_that_confirm_each_other_do_not_acquit_a_set() -> None:
    features, labels, _ = contaminated()
    params = SSLCleanse(method="ssl_cleanse")

    def judged(features: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[splits.Split, splits.Split]:
        near = neighbourhood(Run(device="cpu"), "near", F.normalize(features, dim=1), labels, classes, k=20)
        split, _ = judge(near, labels, params)
        return split, ssl_cleanse.hesitant(split, features, labels, classes)

    before, after = judged(features, labels, 6)
    assert before.verdict == "no_evidence" and (after.verdict, after.target) == ("inconclusive", 2)
    assert "cutting a class in two of class 2" in after.evidence and "try scan" in after.evidence
    one = labels != 2
    before, after = judged(features[one], labels[one] - (labels[one] > 2).long(), 5)
    assert before.verdict == after.verdict == "no_evidence"


def test_an_encoder_that_knows_little_never_says_that_a_set_is_clean() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (300,), generator=generator)
    near = neighbourhood(Run(), "near", F.normalize(torch.randn(300, 8, generator=generator), dim=1), labels, 6, k=25)
    split, _ = judge(near, labels, SSLCleanse(method="ssl_cleanse"))
    assert split.verdict == "inconclusive" and "train it longer" in split.evidence


def test_the_schedule_of_contrastive_training() -> None:
    rate = training.warmed_cosine(200, 0.5)

    def at(epoch: int) -> float:
        return 0.5 * (1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * epoch / 200)) / 2)

    assert rate(0) == 0.01 and rate(5) == pytest.approx((0.01 + at(10)) / 2)
    assert rate(10.5) == pytest.approx(at(11)) and rate(199) == pytest.approx(at(200)) == pytest.approx(5e-4)
    assert training.warmed_cosine(20, 0.5)(2) == pytest.approx(0.5 * (1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * 3 / 20)) / 2))


def test_an_encoder_brings_the_views_of_an_image_together() -> None:
    data = digits.load().train
    run = Run(device="cpu")
    params = SSLCleanse(method="ssl_cleanse", architecture="wrn-10-1", encoder_epochs=8, encoder_batch=128, projector="mlp")
    encoder = encoders.untrained(run, "encoder", data, params, digits.GREY)
    history = encoders.contrast(run, "encoder", encoder, data, params, temperature=0.5)
    assert history[-1] < history[0] - 0.3
    assert data.labels is not None
    near = neighbourhood(run, "near", encoders.embed(run, encoder, data), data.labels, 10, k=50)
    # Without a label, ten digits are told apart far better than by chance.
    assert float((near.elected()[0] == data.labels).float().mean()) > 0.4


def test_ssl_cleansing_finds_wrong_labels_in_a_good_embedding() -> None:
    data = digits.load().train
    assert data.labels is not None
    poison = digits.poisoned(data, BadNets(method="badnets", target=5, sampling="S2"))
    assert poison.labels is not None
    bad = poison.labels != data.labels
    # An embedding that knows the digits, as a long training would give it.
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(4 * F.one_hot(data.labels, 10) + torch.randn(len(data), 10, generator=generator), dim=1)
    near = neighbourhood(Run(), "near", features, poison.labels, 10, k=50)
    for name in ("knn", "energy", "both"):
        split, _ = judge(near, poison.labels, ssl_cleanse.SSLCleanse(method="ssl_cleanse", filter=name))  # type: ignore[arg-type]
        assert (split.verdict, split.target) == ("poisoned", 5)
        assert float(split.clean[bad].float().mean()) < 0.05 and float(split.clean[~bad].float().mean()) > 0.9
        corrected = split.relabelled(poison.labels)
        assert int(corrected.sum()) and float((split.labels == data.labels)[corrected].float().mean()) > 0.95

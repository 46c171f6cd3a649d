"""What a split becomes: a cleansed set, a manifest, a refusal; and which method is proposed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import digits
from core import advice, catalog, page, victim, weights
from core import split as splits
from core.activations import collect
from core.attacks.badnets import BadNets
from core.catalog import Inputs
from core.defenses.cleanse import beatrix, scan, spectral_signatures
from core.defenses.cleanse.fct import FCT
from core.errors import ClassMissing, ClassTooSmall, LabelsMissing, NotEnoughCleanData, OneClassOnly, SplitEmpty
from core.images import ImageSet
from core.run import Run
from core.schooling import divide as divide_set
from tests.conftest import TARGET, Case


def flags(verdict: splits.Verdict) -> tuple[ImageSet, splits.Split]:
    data = ImageSet(torch.zeros(6, 1, 16, 16, dtype=torch.uint8), torch.tensor([0, 0, 0, 1, 1, 1]), ("a", "b"), tuple("uvwxyz"))
    assert data.labels is not None
    flagged = torch.tensor([True, False, False, False, True, False])
    split = splits.of_flags(data.labels, torch.tensor([0.9, 0.1, 0.2, 0.1, 0.8, 0.0]), flagged, "why", verdict=verdict, evidence="seen")
    return data, split


def test_a_set_without_evidence_keeps_its_images_unless_told_otherwise() -> None:
    for verdict, trust, kept in (("no_evidence", True, 6), ("no_evidence", False, 4), ("poisoned", True, 4), ("inconclusive", True, 4)):
        data, split = flags(verdict)  # type: ignore[arg-type]
        assert data.labels is not None
        settled = split.settled(data.labels, splits.Cleansing(trust_verdict=trust))
        assert len(settled.cleansed(data)) == kept


def test_manifest_and_summary_say_the_same(tmp_path: Path) -> None:
    data, split = flags("poisoned")
    assert data.labels is not None
    splits.write_manifest(Run(folder=tmp_path), split, data)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(line["name"], line["action"], line["reason"]) for line in lines[:2]] == [("u", "dropped", "why"), ("v", "kept", "")]
    found = splits.summary(split, data.labels, 2)
    assert found["counts"] == {"kept": 4, "relabelled": 0, "dropped": 2} and found["per_class"]["dropped"] == [1, 1]
    assert sum(found["histogram"]["counts"]["dropped"]) == 2 and len(found["histogram"]["edges"]) == 41
    bars = page.bars(found["histogram"])
    assert max(bar["height"] + 0 for bar in bars) <= page.HEIGHT and {bar["colour"] for bar in bars} == {"#4e79a7", "#b3261e"}


def test_one_class_that_differs_from_the_others_is_evidence() -> None:
    alike = [0.1, 0.11, 0.09, 0.1, 0.12, 0.08, 0.1, 0.11, 0.09, 0.1]
    assert splits.stands_out(alike, "x")[0] == "no_evidence" and splits.stands_out(alike, "x")[2] is None
    assert splits.stands_out([*alike[:9], 0.5], "x")[::2] == ("poisoned", 9)
    assert splits.stands_out([0.1, 0.9], "x")[0] == "inconclusive"
    # Without noise any label would stand out by one image of 130; a tenth of poison stands out, however clean the rest is.
    for hits, verdict in ((1, "inconclusive"), (13, "poisoned")):
        found = splits.stands_out([0.0] * 9 + [hits / 130], "x", image=1 / 130)
        assert found[0] == verdict and ("wrong labels" in found[1]) == (hits == 1)


def test_wrong_labels_alone_are_not_called_poison() -> None:
    verdicts = []
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        truth = torch.randint(10, (1300,), generator=draw)
        given = torch.where(torch.rand(1300, generator=draw) < 0.1, torch.randint(10, (1300,), generator=draw), truth)
        verdicts.append(splits.among_strangers(given, truth, given == truth, 10, judge="model")[0])
        poisoned = torch.where(torch.rand(1300, generator=draw) < 0.05, 5, given)
        assert splits.among_strangers(poisoned, truth, poisoned == truth, 10, judge="model")[2] == 5
    assert verdicts.count("poisoned") <= 1


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ([20, 0], OneClassOnly, "one class, 'a'"),
        ([20, 3], ClassTooSmall, r"fewer than 10 images cannot be judged: b \(3\)"),
        ([20, 20, 0], ClassMissing, "no image of c"),
    ],
)
def test_sets_that_cannot_be_judged(sizes: list[int], error: type[Exception], words: str) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    data = ImageSet(torch.zeros(len(labels), 1, 16, 16, dtype=torch.uint8), labels, tuple("abc"[: len(sizes)]))
    method = catalog.cleansers()["fct"]
    with pytest.raises(error, match=words):
        catalog.require(method, Inputs(suspect=data), FCT(method="fct"))
    with pytest.raises(LabelsMissing):
        catalog.require(method, Inputs(suspect=ImageSet(data.images)), FCT(method="fct"))


def test_a_split_without_a_part_is_refused() -> None:
    data = digits.load().train.subset(torch.arange(200))
    with pytest.raises(SplitEmpty, match="no image for poisoned"):
        divide_set(
            Run(device="cpu"),
            Inputs(suspect=data, preprocessing=digits.GREY),
            FCT(method="fct", architecture="wrn-10-1", epochs=1, tuning_epochs=0, poisoned_share=0.001),
        )


def test_a_given_model_is_taken_instead_of_training_one() -> None:
    data = digits.poisoned(digits.load().train, BadNets(method="badnets", target=5, sampling="S2"))
    model = victim.untrained(Run(device="cpu"), "x", "wrn-10-1", data, digits.GREY)
    events: list[dict[str, Any]] = []
    run = Run(device="cpu", emit=events.append)
    outcome = spectral_signatures.run(run, Inputs(model=model, suspect=data), spectral_signatures.SpectralSignatures(method="spectral_signatures"))
    assert {event["data"]["phase"] for event in events if event["type"] == "phase"} == {"decomposing"}
    assert outcome.embedding is not None and torch.equal(outcome.embedding, collect(run, model.eval().features, data))


def test_scan_judges_by_ten_clean_images_of_a_class_and_by_no_fewer(case: Case) -> None:
    model, _ = weights.identify(weights.read(case.model), case.data.clean)
    labels = case.data.clean.labels
    assert labels is not None
    ten = torch.cat([(labels == label).nonzero()[:10, 0] for label in range(10)])
    params = scan.SCAn(method="scan")
    few = case.data.clean.subset(ten[:-1])
    with pytest.raises(NotEnoughCleanData, match=r"fewer of 9 \(9\)"):
        scan.run(Run(device="cpu"), Inputs(model=model, clean=few, suspect=case.data.train), params)
    clean = case.data.clean.subset(ten)
    with pytest.raises(NotEnoughCleanData, match="all alike"):
        scan.run(Run(device="cpu"), Inputs(model=model, clean=replace(clean, images=torch.zeros_like(clean.images)), suspect=case.data.train), params)
    # 64 features: the inverse of a covariance from a hundred images would tear every class apart.
    poisoned = scan.run(
        Run(device="cpu"), Inputs(model=model, clean=clean, suspect=digits.poisoned(case.data.train, BadNets(method="badnets", target=TARGET))), params
    )
    assert poisoned.findings["contaminated"] == [TARGET] and poisoned.split is not None and 80 <= int(poisoned.split.suspect.sum()) <= 110
    unpoisoned = scan.run(Run(device="cpu"), Inputs(model=model, clean=clean, suspect=case.data.train), params)
    assert unpoisoned.split is not None and unpoisoned.split.verdict == "no_evidence"


def test_beatrix_flags_nothing_by_clean_images_too_few_to_tell_what_is_usual(case: Case) -> None:
    model, _ = weights.identify(weights.read(case.model), case.data.clean)
    labels = case.data.clean.labels
    assert labels is not None
    suspect = digits.poisoned(case.data.train, BadNets(method="badnets", target=TARGET))
    for count, flagged in ((10, (0, 0)), (30, (70, 130))):
        chosen = torch.cat([(labels == label).nonzero()[:count, 0] for label in range(10)])
        split = beatrix.run(
            Run(device="cpu"), Inputs(model=model, clean=case.data.clean.subset(chosen), suspect=suspect), beatrix.Beatrix(method="beatrix")
        ).split
        assert split is not None and flagged[0] <= int(split.suspect.sum()) <= flagged[1]
        # The activations say so without clean images.
        assert (split.verdict, split.target) == ("poisoned", TARGET) and ("clean images enough" in split.evidence) == (count == 10)


def test_what_is_proposed_exists_and_needs_no_more_than_it_says() -> None:
    for proposal in advice.PROPOSALS:
        method = catalog.defenses()[proposal.method]
        params = catalog.validate({method.name: method}, proposal.defense)
        assert method.kind is proposal.kind and catalog.needs(method, params) - {catalog.Need.BATCH_NORM} <= proposal.needs
        # What a network is made of is not something to bring: the sentence says it.
        assert (catalog.Need.BATCH_NORM in method.needs) == ("BatchNorm" in proposal.why)
    everything = advice.propose(list(catalog.Need))
    assert everything == list(advice.PROPOSALS)
    assert [one.method for one in advice.propose([catalog.Need.MODEL])] == ["mm_bd", "clp"]
    assert [one.method for one in advice.propose([catalog.Need.SUSPECT_DATASET])] == ["ssl_cleanse", "d_br"]

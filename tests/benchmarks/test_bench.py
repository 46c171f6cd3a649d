"""The table runner: what it measures, that it goes on, and that every table speaks of methods that exist."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, digits, inspection
from core import catalog, evaluation, poisoning, victim
from core.errors import BadJob
from core.images import ImageSet
from core.poisoning import AttackParams
from core.run import Run
from tests.core.untrained import noise

TABLES = sorted((bench.HERE / "tables").glob("*.toml"))
FCT = {"method": "fct", "architecture": "the victim's", "epochs": 1, "tuning_epochs": 1}
TABLE: dict[str, Any] = {
    "title": "Small",
    "about": "Two rows.",
    "columns": [{"name": "FT", "defense": {"method": "fine_tuning", "epochs": 2, "epoch_images": 0}}],
    "rows": [
        {"name": "none"},
        {"name": "Grid", "from": "Nobody", "attack": {"method": "badnets", "target": 1}, "paper": {"FT": {"asr": 1.5, "ba_excluding_target": 80.0}}},
        {"name": "Consistent", "attack": {"method": "label_consistent", "target": 1, "steps": 1}},
    ],
}


@pytest.mark.parametrize("path", TABLES, ids=[path.stem for path in TABLES])
def test_tables_speak_of_what_exists(path: Path) -> None:
    table = tomllib.loads(path.read_text())
    assert table["title"] and table["about"]
    for row in table["rows"]:
        if "attack" in row:
            catalog.validate(catalog.attacks(), row["attack"])
    for budget in ("full", "cpu"):
        for column in table.get("columns", []):
            defense = {**column["defense"], **column.get(budget, {})}
            catalog.validate(catalog.defenses(), bench.filled(defense, {"method": "badnets", "target": 0}, "wrn-16-1"))
        assert table[budget]["recipe"] in victim.RECIPES
    assert len({row["name"] for row in table["rows"]}) == len(table["rows"])
    assert all(str(row["epochs"]) in row["name"] for row in table["rows"] if "epochs" in row)


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bench.Setting:
    sets: tuple[ImageSet, ImageSet] = (noise(200), noise(90))
    monkeypatch.setattr(bench, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "data", lambda name: sets)
    (tmp_path / "results").mkdir()
    return bench.Setting(dataset="noise", model="wrn-10-1", recipe="cpu", preprocessing="cifar10", clean_fraction=0.2, device="cpu", epochs=1)


def test_a_table_is_measured_once_and_written(setting: bench.Setting, tmp_path: Path) -> None:
    cells = list(bench.planned(TABLE, setting, 2))
    assert len(cells) == 12
    # What needs a surrogate comes after what trains it.
    assert [cell.row for cell in cells[:6]] == ["none", "none", "Grid", "Grid", "Consistent", "Consistent"]
    bench.measure(cells[:3], 1)
    assert bench.write("small", "cpu", TABLE, setting, cells) == 9
    victims = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "victims").glob("*/model.safetensors")}
    assert len(victims) == 2
    bench.measure(cells, 1)
    assert all(path.stat().st_mtime_ns == written for path, written in victims.items())
    assert bench.write("small", "cpu", TABLE, setting, cells) == 0
    found = json.loads((tmp_path / "results" / "small.json").read_text())
    assert len(found["cells"]) == 12 and found["setting"]["model"] == "wrn-10-1"
    grid = next(cell for cell in found["cells"] if cell["cell"]["row"] == "Grid" and cell["cell"]["column"] == "FT")
    assert grid["counts"]["n_poisoned"] == 20 and grid["after"]["asr"]["n"] == 67 and grid["machine"]["torch"]
    (line,) = [line for line in (tmp_path / "results" / "small.md").read_text().splitlines() if line.startswith("| Grid | FT |")]
    assert "± " in line and line.endswith("| 80.0 (target excluded) | 1.5 |") and "| 2 |" in line


def test_a_budget_changes_a_column_and_a_row_changes_both(setting: bench.Setting) -> None:
    column = {"name": "FT", "defense": {"method": "fine_tuning", "epochs": 20}, "cpu": {"epochs": 2, "batch_size": 8}}
    table = {"columns": [column], "rows": [{"name": "none"}, {"name": "own", "defense": {"FT": {"epochs": 3}}}]}

    def defenses(budget: str) -> list[dict[str, Any] | None]:
        return [cell.defense for cell in bench.planned(table, setting, 1, budget) if cell.column == "FT"]

    assert defenses("cpu") == [{"method": "fine_tuning", "epochs": 2, "batch_size": 8}, {"method": "fine_tuning", "epochs": 3, "batch_size": 8}]
    assert defenses("full") == [{"method": "fine_tuning", "epochs": 20}, {"method": "fine_tuning", "epochs": 3}]


def test_a_table_of_cleansers_counts_what_they_find(setting: bench.Setting, tmp_path: Path) -> None:
    table = {
        "title": "Splits",
        "about": "One row.",
        "of": "splits",
        "columns": [{"name": "SS", "defense": {"method": "spectral_signatures", "target": 1, "rate": 0.2}}, {"name": "FCT", "defense": FCT}],
        "rows": [{"name": "none"}, {"name": "Grid", "attack": {"method": "badnets", "target": 1}}],
    }
    cells = list(bench.planned(table, setting, 1))
    bench.measure(cells, 1)
    assert bench.write("splits", "cpu", table, setting, cells) == 0
    found = [cell for cell in json.loads((tmp_path / "results" / "splits.json").read_text())["cells"] if cell["cell"]["column"] == "SS"]
    clean, grid = (next(cell["split"] for cell in found if cell["cell"]["row"] == name) for name in ("none", "Grid"))
    assert clean["poison_recall"]["value"] is None and clean["clean_flagged"]["n"] == 200
    flagged = grid["poison_recall"]["hits"] + grid["clean_flagged"]["hits"]
    assert grid["poison_recall"]["n"] == 20 and flagged == grid["poison_precision"]["n"] > 0
    # What the verdict leaves: nothing is taken from a set without evidence.
    gone = grid["clean_lost"]["hits"] + grid["poison_left"]["n"] - grid["poison_left"]["hits"]
    assert gone == (0 if grid["verdict"] == "no_evidence" else flagged)
    text = (tmp_path / "results" / "splits.md").read_text()
    assert "| Grid | SS |" in text and "| none | FCT |" in text


def test_a_stopped_training_goes_on_to_the_same_victim(setting: bench.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    attack = {"method": "badnets", "target": 1}
    whole = bench.trained(setting, attack, 0)[0].state_dict()
    folder = bench.victim_folder(setting, attack, 0)
    folder.rename(tmp_path / "whole")
    original = victim.train

    def stopping(*arguments: Any, **named: Any) -> Any:
        raise Stop

    monkeypatch.setattr(victim, "train", stopping)
    with pytest.raises(Stop):
        bench.trained(setting, attack, 0)
    assert (folder / "recipe.safetensors").exists() and not (folder / "victim.json").exists()
    monkeypatch.setattr(victim, "train", original)
    again = bench.trained(setting, attack, 0)[0].state_dict()
    assert all((again[name] == value).all() for name, value in whole.items())


def test_the_inspected_models_can_all_be_made() -> None:
    train = digits.load(0).train
    for attack in inspection.ATTACKS:
        params = catalog.validate(catalog.attacks(), {"target": 3, **attack})
        assert isinstance(params, AttackParams)
        recipe = poisoning.plan(Run(device="cpu"), params, train)
        assert not torch.equal(poisoning.poison(train, recipe).data.images, train.images), attack


def test_a_fresh_clone_goes_on_where_committed_results_end(setting: bench.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell for cell in bench.planned(TABLE, setting, 1) if cell.row == "none"]
    bench.measure(cells, 1)
    assert bench.write("small", "cpu", TABLE, setting, cells) == 0
    monkeypatch.setattr(bench, "CACHE", tmp_path / "fresh")
    assert not any(cell.path.exists() for cell in cells)
    bench.restore(bench.results("small", "cpu"))
    assert all(cell.path.exists() for cell in cells)
    assert bench.write("again", "cpu", TABLE, setting, cells) == 0
    assert (tmp_path / "results" / "again.json").read_text() == (tmp_path / "results" / "small.json").read_text()


def test_a_table_can_be_of_a_checkpoint_that_somebody_else_trained(setting: bench.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [replace(cell, setting=replace(cell.setting, model="cases/theirs.pth")) for cell in bench.planned(TABLE, setting, 1) if cell.row == "Grid"]
    monkeypatch.setattr(bench, "SHARED", tmp_path)
    with pytest.raises(BadJob, match="is not in"):
        bench.measure(cells, 1)
    theirs, _ = bench.trained(setting, None, 0)
    (tmp_path / "cases").mkdir()
    torch.save({"state_dict": theirs.network.state_dict()}, tmp_path / "cases" / "theirs.pth")
    bench.measure(cells, 1)
    before, tuned = (json.loads(cell.path.read_text()) for cell in cells)
    _, test = bench.data("noise")
    assert before["before"]["ba"] == evaluation.evaluate(theirs, test)["ba"] == tuned["before"]["ba"] and "asr" in tuned["after"]
    bench.write("theirs", "cpu", TABLE, cells[0].setting, cells)
    assert "cases/theirs.pth, as its authors published it" in (tmp_path / "results" / "theirs.md").read_text()

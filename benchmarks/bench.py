"""One runner for all tables: `python -m benchmarks.bench TABLE --seeds 3 --budget cpu` (or `make bench TABLE=…`).

A table is a TOML file in `benchmarks/tables/`: rows (attacks) by columns (defenses), with the papers' numbers. Victims are
trained once into a cache, every cell is kept as it is finished, so a stopped run goes on where it was. What comes out is
`results/TABLE.json` and `results/TABLE.md`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import digits, pictures, rendering
from benchmarks.rendering import PLAIN
from core import catalog, datasets, evaluation, poisoning, report, victim, weights
from core.activations import Observing
from core.allocator import keep_freed_memory
from core.catalog import Inputs, Kind, Need
from core.classifier import Classifier, Preprocessing
from core.errors import BadJob, EngineError
from core.images import ImageSet
from core.poisoning import AttackParams, Recipe, Triggered
from core.run import Run, repeatable
from core.split import Cleansing, Split

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARED = Path(os.environ.get("UNPOISON_SHARED", ROOT.parent / "shared"))
CACHE = Path(os.environ.get("UNPOISON_BENCH_CACHE", ROOT / ".cache" / "bench"))


@dataclass(frozen=True)
class Setting:
    """What a table's cells have in common.

    Attributes:
        model: an architecture's name; or the path, in `UNPOISON_SHARED`, of a checkpoint that somebody else trained with the row's attack.
        epochs: instead of the recipe's own number, None keeps that.
    """

    dataset: str
    model: str
    recipe: str
    preprocessing: str
    clean_fraction: float
    device: str
    epochs: int | None = None

    @property
    def published(self) -> bool:
        """Whether victims are somebody else's checkpoint."""
        return "/" in self.model

    def training(self) -> victim.Recipe:
        """Return how victims are trained."""
        recipe = victim.RECIPES[self.recipe]
        return victim.shortened(recipe, self.epochs) if self.epochs else recipe

    def normalisation(self) -> Preprocessing:
        """Return the constants that victims are trained with."""
        usual = weights.GREY if self.dataset == "digits" else weights.PREPROCESSINGS
        return next(one for one in usual if one.name == self.preprocessing)


@dataclass(frozen=True)
class Cell:
    """One measurement: an attack, a defense, a seed."""

    setting: Setting
    row: str
    attack: dict[str, Any] | None
    column: str
    defense: dict[str, Any] | None
    seed: int

    @property
    def path(self) -> Path:
        """Where the finished cell is kept."""
        return CACHE / "cells" / f"{digest(asdict(self))}.json"


def main() -> int:
    """Run a table; return 0 when every cell has been measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(path.stem for path in (HERE / "tables").glob("*.toml")))
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds; each draws its own poison and trains its own victim")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--budget", choices=["full", "cpu"], default="cpu", help="the paper's model and schedule, or what two cores finish")
    parser.add_argument("--rows", default="", help="measure only the row of this name, or those whose names contain it; all that is measured is written")
    parser.add_argument("--columns", default="", help="measure only these columns, separated by semicolons and in this order")
    parser.add_argument("--epochs", type=int, help="another number of training epochs; goes into the result")
    parser.add_argument("--jobs", type=int, default=1, help="processes; each gets its share of the cores")
    parser.add_argument("--draw", action="store_true", help="only write the results of the cells measured so far")
    options = parser.parse_args()
    table = tomllib.loads((HERE / "tables" / f"{options.table}.toml").read_text())
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    setting = Setting(
        dataset=table["dataset"], preprocessing=table["preprocessing"], clean_fraction=table.get("clean_fraction", 0.05), device=device,
        **table[options.budget] | ({"epochs": options.epochs} if options.epochs else {}),
    )  # fmt: skip
    cells = list(planned(table, setting, options.seeds, options.budget))
    restore(results(options.table, options.budget))
    try:
        if not options.draw:
            # "CL" is a row's whole name and a part of others'.
            named = [cell for cell in cells if cell.row == options.rows]
            wanted = named or [cell for cell in cells if options.rows.lower() in cell.row.lower()]
            if options.columns:
                wanted = [cell for name in options.columns.split(";") for cell in wanted if cell.column == name.strip()]
            measure(wanted, options.jobs)
    except EngineError as error:
        print(f"{error.message}. {error.advice}", file=sys.stderr)
        return 2
    missing = write(options.table, options.budget, table, setting, cells)
    print(f"{len(cells) - missing} of {len(cells)} cells measured; results/{options.table}.md")
    return 1 if missing else 0


def planned(table: dict[str, Any], setting: Setting, seeds: int, budget: str = "cpu") -> Iterator[Cell]:
    """Yield the cells of a table; attacks that need a surrogate come last, when it has been trained.

    A column's `cpu` or `full` are what that budget changes in its defense, a row's `defense` what the row changes in it.
    """
    # A table of splits is about training sets; its victims say nothing there.
    columns = [*([{"name": PLAIN}] if table.get("of") != "splits" else []), *table.get("columns", [])]

    def needs_surrogate(row: dict[str, Any]) -> bool:
        return "attack" in row and Need.MODEL in catalog.attacks()[row["attack"]["method"]].needs

    for seed in range(seeds):
        for row in sorted(table["rows"], key=needs_surrogate):
            for column in columns:
                unfit = "attack" not in row and "the row's" in column.get("defense", {}).values()
                if unfit or row["name"] not in column.get("rows", [row["name"]]):
                    continue
                # A row may ask for a longer training than its table's; its name says so.
                own = replace(setting, epochs=row["epochs"]) if "epochs" in row and setting.epochs is None else setting
                changed = {**column.get(budget, {}), **row.get("defense", {}).get(column["name"], {})}
                defense = {**column["defense"], **changed} if "defense" in column else None
                yield Cell(own, row["name"], row.get("attack"), column["name"], defense, seed)


def results(name: str, budget: str) -> Path:
    """Return where a table's results are written, without the ending."""
    return HERE / "results" / (name if budget == "cpu" else f"{name}-{budget}")


def restore(path: Path) -> None:
    """Put the cells of the committed results into the cache, so that a fresh clone goes on where they end; what is there already stays."""
    if path.with_suffix(".json").exists():
        for found in json.loads(path.with_suffix(".json").read_text())["cells"]:
            kept = CACHE / "cells" / f"{digest(found['cell'])}.json"
            if not kept.exists():
                keep(kept, found)


def measure(cells: list[Cell], jobs: int) -> None:
    """Measure what has not been measured, in `jobs` processes."""
    waiting = [cell for cell in cells if not cell.path.exists()]
    if jobs == 1:
        for cell in waiting:
            one(cell, 0)
        return
    threads = max((os.cpu_count() or 1) // jobs, 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), end_with_parent, (os.getpid(),)) as pool:
        for done in concurrent.futures.as_completed([pool.submit(one, cell, threads) for cell in waiting]):
            done.result()


def end_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone, however that happened."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def one(cell: Cell, threads: int) -> None:
    """Measure a cell and keep what came of it."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    repeatable()
    started = time.monotonic()
    train, test = data(cell.setting.dataset)
    splits = cell.defense is not None and catalog.defenses()[cell.defense["method"]].kind is Kind.CLEANSE
    if splits and not observes(cell):
        # It trains what it needs itself.
        model, made = None, planned_poison(Run(seed=cell.seed, device=cell.setting.device), cell.setting, cell.attack)
    else:
        model, made = trained(cell.setting, cell.attack, cell.seed)
        model = model.to(cell.setting.device)
    triggered = poisoning.triggered(test, made.trigger, train.classes) if made and not splits else None
    # A cleanser changes no model: there is nothing to measure before and after.
    before = None if splits or model is None else evaluation.evaluate(model, test, triggered)
    found: dict[str, Any] = {"before": before, "after": None, "counts": None}
    # How many images its authors poisoned is theirs to say.
    if made is not None and not cell.setting.published:
        found["counts"] = made.counts(train.labels)
    if cell.defense is not None:
        found |= defended(cell, model, train, test, triggered, made)
    if model is not None:
        found["victim_seconds"] = json.loads((victim_folder(cell.setting, cell.attack, cell.seed) / "victim.json").read_text())["seconds"]
    found["seconds"] = round(time.monotonic() - started, 1)
    found["machine"] = machine()
    keep(cell.path, {"cell": asdict(cell), **found})
    if splits:
        print(
            f"{cell.row} · {cell.column} · seed {cell.seed}: {found.get('split', found).get('evidence', found.get('refused'))}, {found['seconds']:.0f} s",
            flush=True,
        )
        return
    shown = found.get("after") or found["before"]
    asr = f", ASR {shown['asr']['value']:.2%}" if "asr" in shown else ""
    print(f"{cell.row} · {cell.column} · seed {cell.seed}: BA {shown['ba']['value']:.2%}{asr}, {found['seconds']:.0f} s", flush=True)


def observes(cell: Cell) -> bool:
    """Say whether the cell's defense looks at a model trained on the suspect set: it would train the very one that is in the cache."""
    assert cell.defense is not None
    method = catalog.defenses()[cell.defense["method"]]
    params = catalog.validate({method.name: method}, filled(cell.defense, cell.attack, cell.setting.model))
    return isinstance(getattr(params, "split", params), Observing)


def defended(cell: Cell, model: Classifier | None, train: ImageSet, test: ImageSet, triggered: Triggered | None, made: Recipe | None) -> dict[str, Any]:
    """Run the cell's defense on its victim, or on what the victim was trained on, and measure again; the last state counts, whatever it is."""
    assert cell.defense is not None
    method = catalog.defenses()[cell.defense["method"]]
    params = catalog.validate({method.name: method}, filled(cell.defense, cell.attack, cell.setting.model))
    run = Run(seed=cell.seed, device=cell.setting.device)
    clean = train.sample(int(cell.setting.clean_fraction * len(train)), run.generator("clean images")).to(run.device)
    started = time.monotonic()
    inputs = Inputs(model=model, clean=clean)
    poison = poisoning.poison(train, made) if made is not None and Need.SUSPECT_DATASET in method.needs else None
    if Need.SUSPECT_DATASET in method.needs:
        suspect = (poison.data if poison is not None else train).placed(run.device)
        inputs = Inputs(model=model if observes(cell) else None, clean=clean, suspect=suspect, preprocessing=cell.setting.normalisation())
    try:
        catalog.require(method, inputs, params)
        outcome = method.run(run, inputs, params)
    except EngineError as error:
        # What a method says it cannot do is a result too.
        return {"after": None, "refused": error.as_dict(), "defense_seconds": round(time.monotonic() - started, 1)}
    seconds = round(time.monotonic() - started, 1)
    after = evaluation.evaluate(outcome.model, test, triggered) if outcome.model is not None else None
    found = {"after": after, "findings": outcome.findings, "defense_seconds": seconds}
    if outcome.split is not None:
        assert inputs.suspect is not None and inputs.suspect.labels is not None
        bad = poison.is_poisoned if poison is not None else torch.zeros(len(train), dtype=torch.bool)
        found["split"] = judged(outcome.split.cpu(), bad, inputs.suspect.labels.cpu(), params)
    return found


def judged(split: Split, bad: torch.Tensor, given: torch.Tensor, params: catalog.Params) -> dict[str, Any]:
    """Return how good a split is, with what its verdict leaves of the set: `poison_left` keeps its given label, `clean_lost` is dropped.

    Args:
        bad: (N,) bool, the images with the trigger. given: (N,) their labels in the poisoned set.
    """
    rates = evaluation.split_precision(bad, split.clean, split.suspect)
    left = split.settled(given, params) if isinstance(params, Cleansing) else split
    poison_left = left.kept & ~left.relabelled(given) & bad
    return {
        **rates,
        "verdict": split.verdict, "evidence": split.evidence, "target": split.target, "missed": split.missed,
        "clean_flagged": evaluation.rate(int((split.suspect & ~bad).sum()), int((~bad).sum())),
        "poison_left": evaluation.rate(int(poison_left.sum()), int(bad.sum())),
        "clean_lost": evaluation.rate(int((~left.kept & ~bad).sum()), int((~bad).sum())),
    }  # fmt: skip


def filled(defense: dict[str, Any], attack: dict[str, Any] | None, model: str) -> dict[str, Any]:
    """Return a column's parameters for a row: a column may take the row's own attack for its trigger, and the victim's architecture for its own."""
    special = {"the row's": attack, "the victim's": model}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill(inner) for name, inner in value.items()}
        return special.get(value, value) if isinstance(value, str) else value

    filled: dict[str, Any] = fill(defense)
    return filled


def trained(setting: Setting, attack: dict[str, Any] | None, seed: int) -> tuple[Classifier, Recipe | None]:
    """Return the victim and the recipe of its poison (None: trained on clean images), from the cache if they are there."""
    folder = victim_folder(setting, attack, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock"):
        if not (folder / "victim.json").exists():
            train_victim(setting, attack, seed, folder)
    architecture = None if setting.published else setting.model
    model, _ = weights.identify(weights.read(folder / "model.safetensors"), None, architecture=architecture, preprocessing=setting.normalisation())
    return model, Recipe.load(folder / "recipe.safetensors") if attack is not None else None


def train_victim(setting: Setting, attack: dict[str, Any] | None, seed: int, folder: Path) -> None:
    """Poison, train (or read what is published), and write recipe and model into the folder; a stopped training goes on from its last checkpoint."""
    train, _ = data(setting.dataset)
    started = time.monotonic()
    events = (folder / "events.jsonl").open("a")
    run = Run(
        seed=seed, device=setting.device, folder=folder / "run", checkpoint_seconds=60, emit=lambda event: print(json.dumps(event), file=events, flush=True)
    )
    recipe = planned_poison(run, setting, attack)
    if recipe is not None:
        recipe.save(folder / "recipe.safetensors")
        train = poisoning.poison(train, recipe).data
    if setting.published:
        if not (SHARED / setting.model).exists():
            raise BadJob(f"{setting.model} is not in {SHARED}", "Set UNPOISON_SHARED to the folder that holds cases/ and data/.")
        # Not even a benchmark opens a stranger's file itself.
        subprocess.run([sys.executable, "-m", "intake", "model", SHARED / setting.model, folder], check=True, stdout=subprocess.DEVNULL)
    else:
        model = victim.train(run, train, architecture=setting.model, preprocessing=setting.normalisation(), recipe=setting.training())
        weights.save(model, folder / "model.safetensors")
    events.close()
    # The checkpoints of the training are as large as the victim, and nobody needs them now.
    shutil.rmtree(folder / "run")
    keep(folder / "victim.json", {"seconds": round(time.monotonic() - started, 1), "sha256": report.sha256(folder / "model.safetensors"), "machine": machine()})


def planned_poison(run: Run, setting: Setting, attack: dict[str, Any] | None) -> Recipe | None:
    """Return the recipe of a victim's poison, drawn by the run's seed alone; None for an unpoisoned one."""
    if attack is None:
        return None
    kind = catalog.attacks()[attack["method"]]
    params = kind.params(**{"seed": run.seed, **attack})
    assert isinstance(params, AttackParams)
    surrogate = trained(setting, None, run.seed)[0] if Need.MODEL in kind.needs else None
    return poisoning.plan(run, params, data(setting.dataset)[0], surrogate)


def victim_folder(setting: Setting, attack: dict[str, Any] | None, seed: int) -> Path:
    """Return where a victim is kept: its name is a digest of all that decides it."""
    described = {"dataset": setting.dataset, "model": setting.model, "preprocessing": setting.preprocessing, "training": asdict(setting.training())}
    return CACHE / "victims" / digest({**described, "attack": attack, "seed": seed})


def data(name: str) -> tuple[ImageSet, ImageSet]:
    """Return training and test set of a data set, decoded once."""
    if name == "digits":
        return digits.two()
    CACHE.mkdir(parents=True, exist_ok=True)
    with lock(CACHE / f"{name}.lock"):
        return datasets.load(name, SHARED / "data" / name, CACHE / "data", download=True)


def write(name: str, budget: str, table: dict[str, Any], setting: Setting, cells: list[Cell]) -> int:
    """Write results/NAME.json and NAME.md; return how many cells are missing."""
    found = [json.loads(cell.path.read_text()) for cell in cells if cell.path.exists()]
    out = results(name, budget)
    described = {"title": table["title"], "budget": budget, "setting": asdict(setting), "training": asdict(setting.training())}
    out.with_suffix(".json").write_text(json.dumps({**described, "cells": found}, indent=1) + "\n")
    lines = [f"# {table['title']}", "", table["about"], ""]
    recipe = setting.training()
    victims = (
        f"{setting.model}, as its authors published it"
        if setting.published
        else f"{setting.model} on {setting.dataset}, {recipe.epochs} epochs of {recipe.optimizer} ({recipe.schedule.replace('_', ' ')} from {recipe.rate}), "
        f"batch {recipe.batch_size}, {'crop and flip' if recipe.augment else 'no augmentation'}"
    )
    lines += [f"Budget `{budget}`: {victims}; defenses get {100 * setting.clean_fraction:g} % clean images.", ""]
    lines += rendering.splits(table, found) if table.get("of") == "splits" else rendering.models(table, found)
    lines += [
        "",
        f"Percent, mean ± standard deviation over n seeds; without trigger: how often the same images are taken for the target without it; worst class: the change, in points, of the class that lost most; seconds of the defense, or of making the victim. {rendering.machines(one['machine'] for one in found)}",
        "",
    ]
    lines += [*(f"- {note}" for note in (*table.get("notes", []), *table.get(f"notes_{budget}", []))), ""]
    if name == "attacks" and found:
        drawn = [cell for cell in cells if cell.path.exists() and cell.attack is not None and cell.seed == 0]
        # A picture of some attacks only must not take the place of one of all.
        if all((victim_folder(cell.setting, cell.attack, cell.seed) / "victim.json").exists() for cell in drawn):
            pictures.sheet(drawn, out.with_suffix(".png"))
        lines += [f"Clean image, triggered image, and their difference times eight, around grey:\n\n![pictures]({out.name}.png)", ""]
    out.with_suffix(".md").write_text("\n".join(lines))
    return len(cells) - len(found)


def machine() -> dict[str, Any]:
    """Return what the numbers were computed with."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        processor = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), processor)
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    when = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {**report.versions(), "processor": processor, "cores": os.cpu_count(), "commit": commit or "unknown", "date": when}


def digest(value: Any) -> str:
    """Return a short name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def keep(path: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a file's lock: two processes must not train the same victim."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())

"""How often inspection is right: clean and backdoored small models, `python -m benchmarks.inspection`.

Twenty models trained on clean digits and twenty on poisoned ones, over the attacks, each from its own seed; every inspecting method says
what it thinks of each. `--first 0` draws the seeds that thresholds were chosen with; the committed table is of other ones.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import time
from collections import Counter
from typing import Any

import torch

from benchmarks import bench, digits, rendering
from core import catalog, evaluation, poisoning, victim, weights
from core.catalog import Inputs
from core.poisoning import AttackParams
from core.run import Run

ATTACKS: tuple[dict[str, Any], ...] = (
    {"method": "badnets"},
    {"method": "badnets", "size": 2, "place": "random"},
    {"method": "trojan"},
    {"method": "blend", "alpha": 0.3},
    {"method": "sig", "labels": "all_to_one", "sampling": "S1"},
    {"method": "wanet", "sampling": "S1"},
    {"method": "low_frequency"},
    {"method": "chessboard", "sampling": "S1"},
    {"method": "l0_invisible"},
    {"method": "bpp"},
)
METHODS = ("neural_cleanse", "pt_red", "mm_bd")
RECIPE = victim.Recipe(epochs=30, batch_size=64, rate=0.1, schedule="one_cycle", weight_decay=5e-4, nesterov=True)


def main() -> int:
    """Measure; return 0 when at most one clean model in twenty raises an alarm and at least 18 backdoored ones do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=100, help="the first seed")
    parser.add_argument("--count", type=int, default=20, help="how many clean and how many backdoored models")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="", help="write results/NAME.json and NAME.md")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.count)
    wanted = [(seed, attack) for seed in seeds for attack in (None, ATTACKS[seed % len(ATTACKS)])]
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(one, wanted))
    lines = table(found)
    print("\n".join(lines))
    if options.out:
        out, machine = bench.HERE / "results" / options.out, bench.machine()
        out.with_suffix(".json").write_text(json.dumps({"models": found, "machine": machine}, indent=1) + "\n")
        out.with_suffix(".md").write_text("\n".join([*lines, "", rendering.machines([machine]), ""]))
    alarms = Counter(one["attack"] is not None for one in found if one["combined"]["verdict"] == "backdoored")
    return 0 if alarms[False] <= options.count / 20 and alarms[True] >= 0.9 * options.count else 1


def one(wanted: tuple[int, dict[str, Any] | None]) -> dict[str, Any]:
    """Train one model and inspect it."""
    seed, attack = wanted
    torch.set_num_threads(1)
    started = time.monotonic()
    run, data = Run(seed=seed, device="cpu"), digits.load(seed)
    train, trigger = data.train, None
    if attack is not None:
        params = catalog.validate(catalog.attacks(), {"target": seed % 7, "seed": seed, **attack})
        assert isinstance(params, AttackParams)
        recipe = poisoning.plan(run, params, train)
        train, trigger = poisoning.poison(train, recipe).data, recipe.trigger
    model = victim.train(run, train, architecture="wrn-10-1", preprocessing=weights.GREY[0], recipe=RECIPE)
    measured = evaluation.evaluate(model, data.test, poisoning.triggered(data.test, trigger, 10) if trigger else None)
    method = catalog.defenses()["combined"]
    findings = method.run(run, Inputs(model=model, clean=data.clean), method.params(method="combined")).findings
    inspected = {name: {key: said[key] for key in ("verdict", "target", "reason")} for name, said in {**findings["methods"], "combined": findings}.items()}
    result = {"seed": seed, "attack": attack, "target": trigger.params.target if trigger else None, "ba": measured["ba"]["value"], **inspected}
    masks, changes, margins = (findings["methods"][name] for name in METHODS)
    result["scores"] = {
        "p_value": margins["p_value"],
        "margins": margins["margins"],
        "perturbation_p_value": changes["p_value"],
        "perturbation_norms": changes["norms"],
        "anomaly_index": masks["anomaly_index"],
        "mask_norms": masks["mask_norms"],
    }
    result |= {"asr": measured["asr"]["value"] if trigger else None, "seconds": round(time.monotonic() - started, 1)}
    print(
        f"p {margins['p_value']:.2g} {changes['p_value']:.2g}",
        seed,
        attack and attack["method"],
        f"BA {result['ba']:.2f}",
        result["asr"] and f"ASR {result['asr']:.2f}",
        {n: said["verdict"] for n, said in inspected.items()},
        flush=True,
    )
    return result


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the counts as Markdown: alarms among clean models, and alarms and right targets an attack."""
    seeds = [one["seed"] for one in found]
    lines = [
        "# Inspection of small models",
        "",
        f"WRN-10-1 on 16x16 digits, seeds {min(seeds)} to {max(seeds)}; 300 clean images for the methods that need some. Alarms of models; in brackets, the right target.",
        "",
        "| models | n | BA | ASR | " + " | ".join((*METHODS, "combined")) + " |",
        "|---|---|---|---|" + "---|" * (len(METHODS) + 1),
    ]
    names = ["clean", *dict.fromkeys(one["attack"]["method"] for one in found if one["attack"])]
    groups = {name: [one for one in found if (one["attack"] or {"method": "clean"})["method"] == name] for name in names}
    groups["all backdoored"] = [one for one in found if one["attack"]]
    for name, models in groups.items():
        cells = []
        for method in (*METHODS, "combined"):
            alarms = [one for one in models if one[method]["verdict"] == "backdoored"]
            right = sum(one[method]["target"] == one["target"] for one in alarms)
            cells.append(f"{len(alarms)}" + (f" ({right})" if name != "clean" else ""))
        ba = sum(one["ba"] for one in models) / len(models)
        asr = "" if name == "clean" else f"{100 * sum(one['asr'] for one in models) / len(models):.1f}"
        lines.append(f"| {name} | {len(models)} | {100 * ba:.1f} | {asr} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

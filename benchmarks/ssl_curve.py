"""What SSL cleansing finds as its encoder learns: `python -m benchmarks.ssl_curve blend --epochs 4`.

CIFAR-10's training set with one of the attacks of SSL-Cleanse's Tables 1 and 2, a small encoder; after some epochs both filters judge the set by
the projection. Then a classifier is trained on what each of `--retrain` leaves, beside one trained on the poisoned set. Writes what it has into
results/ssl-curve.json as it goes, beside the other attacks; the last line printed is the attack's part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from benchmarks import bench
from core import catalog, encoders, evaluation, poisoning, victim, weights
from core.defenses.cleanse.ssl_cleanse import SSLCleanse, judge
from core.images import ImageSet
from core.neighbours import Neighbourhood, neighbourhood
from core.poisoning import AttackParams
from core.run import Run
from core.split import Split

# 1,000 images of other classes than the target's, 5,000 of WaNet.
ATTACKS: dict[str, dict[str, Any]] = {
    "additive": {"method": "chessboard", "target": 5, "sampling": "S7", "count": 1000},
    "badnets": {"method": "badnets", "target": 5, "sampling": "S7", "count": 1000},
    "blend": {"method": "blend", "target": 5, "pattern": "patch", "sampling": "S7", "count": 1000},
    "wanet": {"method": "wanet", "target": 5, "sampling": "S7", "count": 5000},
}
FILTERS = ("knn", "energy")
RESULTS = bench.HERE / "results" / "ssl-curve.json"
MARKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 100, 200, 300, 500, 1000)


def main() -> int:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("--epochs", type=int, default=4, help="of the whole schedule")
    parser.add_argument("--architecture", default="wrn-16-1")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--retrain", choices=FILTERS, nargs="*", default=["knn"], help="train a classifier on what these filters leave")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    train, _ = bench.data("cifar10")
    run = Run(device=options.device)
    attack = catalog.validate(catalog.attacks(), ATTACKS[options.attack])
    assert isinstance(attack, AttackParams)
    poisoned = poisoning.poison(train, poisoning.plan(run, attack, train))
    data = poisoned.data.placed(run.device)
    params = SSLCleanse(method="ssl_cleanse", architecture=options.architecture, encoder_epochs=options.epochs, encoder_batch=options.batch)
    encoder = encoders.untrained(run, "encoder", data, params, weights.PREPROCESSINGS[0])
    started = time.monotonic()
    found: dict[str, Any] = {"attack": ATTACKS[options.attack], "encoder": params.model_dump(mode="json"), "machine": bench.machine(), "curve": []}
    last: dict[str, Split] = {}

    def measure(epoch: int) -> None:
        if epoch not in MARKS and epoch != options.epochs:
            return
        encoder.eval()
        near = neighbours(encoders.embed(run, encoder, data), poisoned, params)
        for name in FILTERS:
            last[name] = judge(near, data.labels, params.model_copy(update={"filter": name}))[0].cpu()
            found["curve"].append({"epoch": epoch, "seconds": round(time.monotonic() - started), "filter": name, **quality(last[name], poisoned)})
            print(json.dumps(found["curve"][-1]), flush=True)
        encoder.train()
        keep(options.attack, found)

    encoders.contrast(run, "encoder", encoder, data, params, temperature=params.temperature, after_epoch=measure)
    found["trained"] = {}
    for name in ("none", *options.retrain) if options.retrain else ():
        found["trained"][name] = retrained(
            options.architecture, options.device, ATTACKS[options.attack], poisoned.data if name == "none" else last[name].cleansed(poisoned.data)
        )
        keep(options.attack, found)
    print(json.dumps(found))
    return 0


def retrained(architecture: str, device: str, attack: dict[str, Any], data: ImageSet) -> dict[str, Any]:
    """Return accuracy and ASR of a classifier trained on `data` in six epochs."""
    _, test = bench.data("cifar10")
    params = catalog.validate(catalog.attacks(), attack)
    assert isinstance(params, AttackParams)
    triggered = poisoning.triggered(test, poisoning.declared(params, (3, 32, 32), 10), 10)
    started = time.monotonic()
    model = victim.train(Run(device=device), data, architecture=architecture, preprocessing=weights.PREPROCESSINGS[0], recipe=victim.RECIPES["cpu"])
    rates = evaluation.evaluate(model, test, triggered)
    return {"images": len(data), "seconds": round(time.monotonic() - started), **{name: rates[name] for name in ("ba", "asr", "asr_without_trigger")}}


def keep(attack: str, found: dict[str, Any]) -> None:
    """Write an attack's part of the results."""
    with bench.lock(bench.CACHE / "ssl-curve.lock"):
        RESULTS.write_text(json.dumps(json.loads(RESULTS.read_text()) | {attack: found}, indent=1) + "\n")


def neighbours(features: torch.Tensor, poisoned: poisoning.Poisoned, params: SSLCleanse) -> Neighbourhood:
    """Return votes and energies of an embedding; as many neighbours as half a class has images."""
    labels = poisoned.data.labels
    assert labels is not None
    return neighbourhood(
        Run(device=str(features.device)), "near", features, labels.to(features.device), 10, k=len(labels) // 20, temperature=params.temperature
    )


def quality(split: Split, poisoned: poisoning.Poisoned) -> dict[str, Any]:
    """Return what a filter makes of the set: accepted by the filter alone, and left after relabelling."""
    bad, labels = poisoned.is_poisoned, poisoned.data.labels
    assert labels is not None
    corrected = split.relabelled(labels)
    as_given = split.kept & ~corrected
    return {
        **evaluation.filter_rates(bad, split.clean),
        "clean_dropped": evaluation.rate(int((~split.kept & ~bad).sum()), int((~bad).sum())),
        "clean_relabelled": evaluation.rate(int((corrected & ~bad).sum()), int((~bad).sum())),
        "poisoned_left": evaluation.rate(int((as_given & bad).sum()), int(bad.sum())),
        "verdict": split.verdict, "evidence": split.evidence,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""What SSL cleansing finds as its encoder learns: `python -m benchmarks.ssl_curve --epochs 8`.

CIFAR-10's training set with 1,000 BadNets images (SSL-Cleanse, Tables 1 and 3), a small encoder; after some epochs both filters judge the set by
the projection. Writes results/ssl-curve.json as it goes; the last line printed is the same JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from benchmarks import bench
from core import catalog, encoders, evaluation, poisoning, weights
from core.defenses.cleanse.ssl_cleanse import SSLCleanse, judge
from core.neighbours import neighbourhood
from core.poisoning import AttackParams
from core.run import Run

ATTACK = {"method": "badnets", "target": 5, "sampling": "S7", "count": 1000}
MARKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 100, 200, 300, 500, 1000)


def main() -> int:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16, help="of the whole schedule")
    parser.add_argument("--architecture", default="wrn-16-1")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    train, _ = bench.data("cifar10")
    run = Run(device=options.device)
    attack = catalog.validate(catalog.attacks(), ATTACK)
    assert isinstance(attack, AttackParams)
    poisoned = poisoning.poison(train, poisoning.plan(run, attack, train))
    data = poisoned.data.placed(run.device)
    params = SSLCleanse(method="ssl_cleanse", architecture=options.architecture, encoder_epochs=options.epochs, encoder_batch=options.batch)
    encoder = encoders.untrained(run, "encoder", data, params, weights.PREPROCESSINGS[0])
    started = time.monotonic()
    found: dict[str, Any] = {"attack": ATTACK, "encoder": params.model_dump(mode="json"), "machine": bench.machine(), "curve": []}

    def measure(epoch: int) -> None:
        if epoch not in MARKS and epoch != options.epochs:
            return
        encoder.eval()
        found["curve"] += quality(encoders.embed(run, encoder, data), poisoned, params, epoch, round(time.monotonic() - started))
        encoder.train()
        (bench.HERE / "results" / "ssl-curve.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found["curve"][-2:]), flush=True)

    encoders.contrast(run, "encoder", encoder, data, params, temperature=params.temperature, after_epoch=measure)
    print(json.dumps(found))
    return 0


def quality(features: torch.Tensor, poisoned: poisoning.Poisoned, params: SSLCleanse, epoch: int, seconds: int) -> list[dict[str, Any]]:
    """Return what each filter makes of an embedding."""
    labels, bad = poisoned.data.labels, poisoned.is_poisoned
    assert labels is not None
    labels = labels.to(features.device)
    near = neighbourhood(Run(device=str(features.device)), "near", features, labels, 10, k=len(labels) // 20, temperature=params.temperature)
    found = []
    for name in ("knn", "energy"):
        split = judge(near, labels, params.model_copy(update={"filter": name}))[0].cpu()
        corrected = split.relabelled(labels.cpu())
        rates = evaluation.filter_rates(bad, split.clean)
        as_given = split.kept & ~corrected
        found.append(
            {
                "epoch": epoch, "seconds": seconds, "filter": name, **rates,
                "clean_dropped": evaluation.rate(int((~split.kept & ~bad).sum()), int((~bad).sum())),
                "clean_relabelled": evaluation.rate(int((corrected & ~bad).sum()), int((~bad).sum())),
                "poisoned_left": evaluation.rate(int((as_given & bad).sum()), int(bad.sum())),
                "verdict": split.verdict, "evidence": split.evidence,
            }
        )  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())

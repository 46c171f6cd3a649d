"""`make demo`: backdoor a small model, upload it, inspect it, purify it, print before and after."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import digits, service
from client.resources import succeeded
from core.attacks.badnets import BadNets

TARGET = 5


def main() -> int:
    """Run the demo; return 0 when the backdoor is gone and the accuracy is not."""
    started = time.monotonic()
    folder = Path(".demo").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    say("1/4  training a small model on handwritten digits, with a backdoor: a 3x3 patch means 5")
    data, attack = digits.load(), BadNets(method="badnets", target=TARGET)
    digits.trained(digits.poisoned(data.train, attack), folder / "suspect.safetensors")
    say("2/4  starting the service and uploading the model, 300 clean images and a test set")
    with service.running(folder / "service") as client:
        model = client.models.upload(folder / "suspect.safetensors")
        clean = client.datasets.upload(digits.npz(data.clean, folder / "clean.npz"))
        test = client.datasets.upload(digits.npz(data.test, folder / "test.npz"))
        say("3/4  inspecting the model: is there a backdoor, and where does it lead?")
        inspection = finish(client, client.jobs.create(model=model, dataset=clean, defense={"method": "neural_cleanse", "passes": 150}))
        found = inspection["results"]["findings"]
        say(f"     {found['verdict']}: {found['reason']}")
        target = found["target"] if found["target"] is not None else TARGET
        say(f"4/4  purifying it with MCLDef against class {target}")
        evaluation = {"dataset_id": test["id"], "attack": {"method": "badnets", "target": TARGET}}
        job = client.jobs.create(model=model, dataset=clean, defense={"method": "mcldef", "target": target}, evaluation=evaluation)
        job = finish(client, job)
        cleaned = next(item for item in client.jobs.artifacts(job["id"]) if item["kind"] == "cleaned_model")
        client.artifacts.download(cleaned["id"], folder / "clean.safetensors")
        address = f"{client.url}{job['urls']['report']}"
        (folder / "report.json").write_text(json.dumps(client.jobs.report(job["id"]), indent=1))
    before, after = job["results"]["before"], job["results"]["after"]
    print(f"\n{'':28}{'before':>10}{'after':>10}")
    for name, title in (("ba", "benign accuracy (BA)"), ("asr", "attack success rate (ASR)"), ("pa", "patched accuracy (PA)")):
        print(f"{title:28}{before[name]['value']:>10.1%}{after[name]['value']:>10.1%}")
    print(f"\nreport           .demo/report.json   (served at {address} while the service ran)")
    print("purified model   .demo/clean.safetensors\n")
    summary = {
        "before": {name: before[name]["value"] for name in ("ba", "asr", "pa")},
        "after": {name: after[name]["value"] for name in ("ba", "asr", "pa")},
        "verdict": found["verdict"],
        "target": found["target"],
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary))
    good = before["asr"]["value"] > 0.9 and after["asr"]["value"] < 0.05 and before["ba"]["value"] - after["ba"]["value"] < 0.03
    return 0 if good else 1


def finish(client: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Wait for a job, showing its phases, and return it."""
    shown = ""

    def seen(now: dict[str, Any]) -> None:
        nonlocal shown
        if now["phase"] and now["phase"] != shown:
            shown = now["phase"]
            say(f"     {shown} …")

    return succeeded(client.jobs.wait(job["id"], timeout=900, seen=seen))


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

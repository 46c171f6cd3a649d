"""A whole training set through the service: `python -m benchmarks.cleansing`.

CIFAR-10's 50,000 training images, 1,000 of them with a trigger, as a zip of class folders: uploaded, cleansed with a small encoder, the engine
killed (-9) on the way, downloaded, opened as an ImageFolder and compared with the manifest. Prints seconds and peak memory; exit code 1 if
anything does not match.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from benchmarks import bench, service
from client import Client
from client.resources import succeeded
from core import catalog, poisoning
from core.images import ImageSet
from core.poisoning import AttackParams
from core.run import Run

ATTACK = {"method": "badnets", "target": 5, "sampling": "S7", "count": 1000}


def main() -> int:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="of the encoder, a WRN-10-1")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=Path(".cache").absolute() if Path(".cache").exists() else None))
    try:
        found = measure(folder, options.epochs, options.images)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found["machine"] = bench.machine()
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0 if found["matches"] else 1


def measure(folder: Path, epochs: int, images: int) -> dict[str, Any]:
    """Do it all once."""
    train, _ = bench.data("cifar10")
    train = train.sample(images, Run().generator("images")) if images < len(train) else train
    params = catalog.validate(catalog.attacks(), ATTACK)
    assert isinstance(params, AttackParams)
    poisoned = poisoning.poison(train, poisoning.plan(Run(device="cpu"), params, train))
    upload = zipped(poisoned.data, folder / "crowd.zip")
    seconds: dict[str, float] = {}
    with service.running(folder / "service", UNPOISON_CHECKPOINT_SECONDS="5", UNPOISON_LEASE_SECONDS="10", UNPOISON_BEAT_SECONDS="2") as client:
        started = time.monotonic()
        suspect = client.datasets.upload(upload)
        seconds["upload"] = time.monotonic() - started
        started = time.monotonic()
        defense = {"method": "ssl_cleanse", "architecture": "wrn-10-1", "encoder_epochs": epochs, "encoder_batch": 256, "trust_verdict": False}
        job = client.jobs.create(suspect_dataset=suspect, defense=defense)
        with Watched() as watched:
            kill_in_phase(client, job["id"], "comparing")
            job = succeeded(client.jobs.wait(job["id"], timeout=4 * 3600))
        seconds["job"] = time.monotonic() - started
        started = time.monotonic()
        cleansed = client.datasets.get(job["cleansed_dataset_id"])
        while cleansed["status"] == "received":
            time.sleep(0.5)
            cleansed = client.datasets.get(cleansed["id"])
        client.datasets.download(cleansed["id"], folder / "cleansed.zip")
        manifest = next(item for item in client.jobs.artifacts(job["id"]) if item["kind"] == "manifest")
        client.artifacts.download(manifest["id"], folder / "manifest.jsonl")
        seconds["download"] = time.monotonic() - started
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    wrong = differences(folder, lines)
    bad = set(poisoned.chosen.tolist())
    names = {member: index for index, member in enumerate(members(poisoned.data))}
    told = Counter((line["action"], names[line["name"]] in bad) for line in lines)
    return {
        "images": len(lines), "epochs": epochs, "attempts": job["attempt"], "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "engine_peak_mb": round(watched.peak / 1e6), "matches": not wrong, "wrong": wrong[:5], "verdict": job["results"]["cleansing"]["verdict"],
        "counts": {f"{action}, {'poisoned' if is_bad else 'clean'}": count for (action, is_bad), count in sorted(told.items())},
    }  # fmt: skip


def members(data: ImageSet) -> list[str]:
    """Return what the images of a set are called in the zip."""
    assert data.labels is not None
    return [f"train/{data.class_names[label] if data.class_names else label}/{index:05}.png" for index, label in enumerate(data.labels.tolist())]


def zipped(data: ImageSet, path: Path) -> Path:
    """Write a set as a zip of class folders of PNG files."""
    pixels = data.images.permute(0, 2, 3, 1).numpy()
    with zipfile.ZipFile(path, "w") as out:
        for name, array in zip(members(data), pixels, strict=True):
            picture = io.BytesIO()
            Image.fromarray(array).save(picture, "PNG", compress_level=1)
            out.writestr(name, picture.getvalue())
    return path


class Watched:
    """Watches the memory of all processes below this one that run the engine, worker or reader; `peak` is the largest one's, bytes."""

    peak = 0

    def __enter__(self) -> Watched:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    self.peak = max(self.peak, process.memory_info().rss)
                except psutil.Error:
                    continue


def kill_in_phase(client: Client, job_id: str, phase: str) -> None:
    """Kill the engine a few seconds after it has reached a phase."""
    while (job := client.jobs.get(job_id))["phase"] != phase:
        if job["finished_at"]:
            return
        time.sleep(0.2)
    time.sleep(3)
    for process in psutil.Process().children(recursive=True):
        if "worker.engine" in process.cmdline():
            process.kill()


def differences(folder: Path, lines: list[dict[str, Any]]) -> list[str]:
    """Return where the downloaded zip, opened as an ImageFolder, is not what the manifest says of the uploaded one."""
    from torchvision.datasets import ImageFolder

    with zipfile.ZipFile(folder / "cleansed.zip") as packed:
        packed.extractall(folder / "tree")
        names = set(packed.namelist())
        with zipfile.ZipFile(folder / "crowd.zip") as original:
            wrong = [line["name"] for line in lines if line["path"] and packed.read(line["path"]) != original.read(line["name"])]
    opened = ImageFolder(str(folder / "tree" / "train"))
    told = {line["path"]: line["label"] for line in lines if line["path"]}
    found = {str(Path(path).relative_to(folder / "tree")): opened.classes[label] for path, label in opened.samples}
    return wrong + sorted(names ^ set(told)) + [path for path in told if found.get(path) != told[path]]


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.exit(main())

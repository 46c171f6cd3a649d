"""How fast and how small reading is, `python -m benchmarks.intake`: CIFAR-10 in a zip, a checkpoint of 100 MB, an upload of 1 GB
whose line is cut 20 times and whose API is killed twice, and the API's latency while hostile files are read. Everything goes through the fence.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks import bench, service
from benchmarks.api import api_process, poll
from benchmarks.cleansing import zipped
from client import ApiError, Client
from core import architectures
from intake import door
from tests.intake import corpus


def main() -> int:
    """Measure and print; the last line is one JSON object. Return 0 when every aim is reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=Path(".cache").absolute() if Path(".cache").exists() else None))
    try:
        found: dict[str, Any] = {"pictures": pictures(folder, options.images)}
        with service.running(folder / "service") as client:
            found["checkpoint"] = checkpoint(client, folder)
            found["cut"] = cut(client, folder, options.bytes)
            found["hostile"] = hostile(client, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found["machine"] = bench.machine()
    one = found["pictures"]
    print(f"{one['images']} PNG in a zip: {one['images_per_second']:.0f} images/s, {one['reader_mb']:.0f} MB for a result of {one['result_mb']:.0f} MB")
    print(
        f"checkpoint of {found['checkpoint']['mb']:.0f} MB: ready {found['checkpoint']['seconds']:.2f} s after its last byte, in {found['checkpoint']['reader_mb']:.0f} MB"
    )
    print(
        f"{found['cut']['bytes']} bytes, cut {found['cut']['cuts']} times, the API killed twice: {'whole' if found['cut']['same'] else 'BROKEN'} after {found['cut']['seconds']:.1f} s"
    )
    print(f"polls while {found['hostile']['files']} hostile files were read: p99 {found['hostile']['p99_ms']:.1f} ms, {found['hostile']['per_second']:.0f}/s")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    quick = found["checkpoint"]["seconds"] < 1 + found["checkpoint"]["mb"] / 100
    return 0 if one["images_per_second"] >= 6000 and quick and found["cut"]["same"] and found["hostile"]["p99_ms"] < 100 else 1


def pictures(folder: Path, count: int) -> dict[str, Any]:
    """Read CIFAR-10's first `count` training images, as PNG in ten class folders, from a zip."""
    train, _ = bench.data("cifar10")
    zipped(train.subset(torch.arange(count)), folder / "pictures.zip")
    out_folder = folder / "read"
    out_folder.mkdir()
    started = time.perf_counter()
    verdict = door.examine("dataset", folder / "pictures.zip", out_folder)
    seconds = time.perf_counter() - started
    assert verdict.ready and verdict.description["count"] == count, verdict
    return {
        "images": count,
        "images_per_second": count / seconds,
        "reader_mb": reader_memory("dataset", folder / "pictures.zip", folder),
        "result_mb": (out_folder / "dataset.safetensors").stat().st_size / 1e6,
    }


def reader_memory(purpose: str, file: Path, folder: Path) -> float:
    """Return the peak memory of the fenced reader, in MB; its parent is a small one, because a child's peak counts what it was forked from."""
    out = folder / "measured"
    out.mkdir()
    ask = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    command = [sys.executable, "-c", ask, sys.executable, "-m", "intake", purpose, str(file), str(out)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    shutil.rmtree(out)
    return int(said) / 1e3


def checkpoint(client: Client, folder: Path) -> dict[str, Any]:
    """Upload a ResNet-50 of torchvision's form; the time is the server's, from the last byte to `ready`."""
    described = architectures.named("resnet50", classes=1000)
    state = {described.theirs(name): value for name, value in described.build().state_dict().items()}
    torch.save(state, folder / "resnet50.pth")
    key = client._transport._http.headers["Authorization"]  # type: ignore[attr-defined]
    with httpx.Client(base_url=client.url, headers={"Authorization": key}, timeout=600) as http, (folder / "resnet50.pth").open("rb") as body:
        answer = http.post("/v1/models", content=body, headers={"Content-Type": "application/octet-stream"})
    assert answer.status_code == 201 and answer.json()["status"] == "ready", answer.text
    told = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    return {
        "mb": (folder / "resnet50.pth").stat().st_size / 1e6,
        "seconds": float(told["read"]) / 1000,
        "reader_mb": reader_memory("model", folder / "resnet50.pth", folder),
    }


def cut(client: Client, folder: Path, size: int, cuts: int = 20) -> dict[str, Any]:
    """Send a file of about `size` bytes in parts over a line that breaks at random places, to an API that is killed twice."""
    source = folder / "big.npz"
    np.savez(source, images=np.random.default_rng(0).integers(0, 256, (size // 3072, 32, 32, 3), dtype=np.uint8))
    total, chance = source.stat().st_size, random.Random(1)
    key = {"Authorization": client._transport._http.headers["Authorization"]}  # type: ignore[attr-defined]
    with httpx.Client(base_url=client.url, headers=key, timeout=600) as http:
        where = http.post("/v1/uploads", json={"kind": "dataset", "bytes": total, "filename": "big.npz"}).headers["location"]
        started = time.perf_counter()
        for number in range(cuts):
            if number in (cuts // 3, 2 * cuts // 3):
                api_process(client).kill()
                comes_back(http)
            at = int(http.head(where).headers["upload-offset"])
            break_off(client.url, where, key, source, at, total, chance.randrange(1, max((total - at) // 5, 2)))
        time.sleep(0.5)
        while (at := int(http.head(where).headers["upload-offset"])) < total:
            with source.open("rb") as file:
                file.seek(at)
                http.patch(where, content=file.read(64 << 20), headers={"Upload-Offset": str(at), "Content-Type": "application/octet-stream"})
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        answer = http.post(f"{where}/complete", json={"sha256": sha256})
    same = answer.status_code == 201 and answer.json()["sha256"] == sha256
    return {"bytes": total, "cuts": cuts, "same": same, "seconds": time.perf_counter() - started}


def comes_back(http: httpx.Client) -> None:
    """Wait until the API that was killed answers again."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            http.get("/livez")
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the API did not come back")


def break_off(url: str, where: str, headers: dict[str, str], source: Path, at: int, total: int, after: int) -> None:
    """Begin a part that announces the rest of the file, and close the line after some bytes of it."""
    host, port = url.removeprefix("http://").split(":")
    lines = [f"PATCH {where} HTTP/1.1", f"Host: {host}", f"Content-Length: {total - at}", f"Upload-Offset: {at}", *(f"{k}: {v}" for k, v in headers.items())]
    with socket.create_connection((host, int(port))) as line, source.open("rb") as file:
        line.sendall("\r\n".join([*lines, "", ""]).encode())
        file.seek(at)
        while after > 0:
            piece = file.read(min(after, 1 << 20))
            line.sendall(piece)
            after -= len(piece)
        time.sleep(0.1)
        line.shutdown(socket.SHUT_WR)
        line.settimeout(60)
        while line.recv(4096):
            pass


def hostile(client: Client, folder: Path, seconds: float = 15.0) -> dict[str, Any]:
    """Poll a status while another thread uploads one hostile file after the other."""
    model = client.models.list()[0]
    dataset = client.datasets.list()[0]
    job = client.jobs.create(model=model, dataset=dataset, defense={"method": "mm_bd"})
    client.jobs.cancel(job["id"])
    client.jobs.wait(job["id"])
    done, sent = threading.Event(), 0

    def send() -> None:
        nonlocal sent
        while not done.is_set():
            for _, data in corpus.checkpoints("/nonexistent"):
                if done.is_set():
                    return
                (folder / "hostile").write_bytes(data)
                try:
                    client.models.upload(folder / "hostile")
                except ApiError:
                    sent += 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        found = poll(client, job["id"], seconds, 4)
    finally:
        done.set()
        thread.join()
    return {**found, "files": sent}


if __name__ == "__main__":
    sys.exit(main())

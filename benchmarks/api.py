"""The API's rates: `python -m benchmarks.api`. Two things in one run: ours against `dd` + `sha256sum` on the same disk, and
authenticated status polls a second, idle and beside a job. Client and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import digits, service
from client import Client
from core.attacks.badnets import BadNets


def main() -> int:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=2_000_000_000)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=Path(".cache").absolute() if Path(".cache").exists() else None))
    try:
        with service.running(folder / "service") as client:
            found: dict[str, Any] = {"transfer": transfer(client, folder, options.bytes)}
            found["polls"] = polls(client, folder, options.seconds, options.connections)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found["machine"] = {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    transferred, polled = found["transfer"], found["polls"]
    print(f"upload    {transferred['upload_mb_s']:8.0f} MB/s   {transferred['upload_share']:.0%} of dd + sha256sum ({transferred['reference_mb_s']:.0f} MB/s)")
    print(f"download  {transferred['download_mb_s']:8.0f} MB/s   {transferred['download_share']:.0%}")
    print(f"API memory during both: +{transferred['api_memory_mb']:.0f} MB")
    for name in ("idle", "beside_a_job"):
        print(f"polls, {name:13} {polled[name]['per_second']:8.0f} /s   p50 {polled[name]['p50_ms']:.1f} ms   p99 {polled[name]['p99_ms']:.1f} ms")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0


def transfer(client: Client, folder: Path, size: int) -> dict[str, Any]:
    """Upload and download a data set of about `size` bytes; the reference writes, syncs and hashes the same bytes with dd and sha256sum."""
    source = folder / "big.npz"
    rng = np.random.default_rng(0)
    rows = size // 3072
    np.savez(source, images=rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8))
    size = source.stat().st_size
    reference = timed(lambda: reference_copy(source, folder / "copy"))
    (folder / "copy").unlink()
    process = api_process(client)
    before, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    connection = HTTPConnection(client.url.removeprefix("http://"), timeout=600)
    key = {"Authorization": client._transport._http.headers["Authorization"]}
    sent = 0.0
    with source.open("rb") as body:
        started = time.perf_counter()
        connection.request(
            "POST", "/v1/datasets?filename=big.npz", body=body, headers={**key, "Content-Type": "application/octet-stream", "Content-Length": str(size)}
        )
        answer = connection.getresponse()
        whole = time.perf_counter() - started
        told = dict(part.split(";dur=") for part in answer.getheader("server-timing", "").split(", ") if ";dur=" in part)
        found = json.loads(answer.read())
    sent = float(told["receive"]) / 1000
    while found["status"] == "received":
        time.sleep(0.5)
        found = client.datasets.get(found["id"])
    connection.close()
    started = time.perf_counter()
    connection.request("GET", f"/v1/datasets/{found['id']}/content", headers=key)
    answer = connection.getresponse()
    with (folder / "back").open("wb") as out:
        shutil.copyfileobj(answer, out, 1 << 20)
    got = time.perf_counter() - started
    done.set()
    watcher.join()
    same = subprocess.run(["cmp", str(source), str(folder / "back")], check=False).returncode == 0
    assert same, "the download differs from the upload"
    client.datasets.delete(found["id"])
    return {
        "bytes": size,
        "reference_mb_s": size / reference / 1e6,
        "upload_mb_s": size / sent / 1e6,
        "upload_share": reference / sent,
        "upload_and_reading_seconds": round(whole, 2),
        "download_mb_s": size / got / 1e6,
        "download_share": reference / got,
        "api_memory_mb": (peak - before) / 1e6,
    }


def reference_copy(source: Path, target: Path) -> None:
    """Write the bytes to the same disk, synced, then hash them."""
    subprocess.run(["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync", "status=none"], check=True)
    subprocess.run(["sha256sum", str(target)], check=True, stdout=subprocess.DEVNULL)


def polls(client: Client, folder: Path, seconds: float, connections: int) -> dict[str, Any]:
    """Poll one job's status from a process of its own, idle and while a job runs."""
    data, attack = digits.load(), BadNets(method="badnets", target=5)
    digits.trained(digits.poisoned(data.train, attack), folder / "suspect.safetensors", epochs=2)
    model = client.models.upload(folder / "suspect.safetensors")
    clean = client.datasets.upload(digits.npz(data.clean, folder / "clean.npz"))
    defense = {"method": "mcldef", "target": 5, "inversion_epochs": 10_000, "patience": 10_000}
    job = client.jobs.create(model=model, dataset=clean, defense=defense)
    client.jobs.cancel(job["id"])
    client.jobs.wait(job["id"])
    found = {"idle": poll(client, job["id"], seconds, connections)}
    job = client.jobs.create(model=model, dataset=clean, defense=defense)
    while not client.jobs.get(job["id"])["progress"]:
        time.sleep(0.1)
    found["beside_a_job"] = poll(client, job["id"], seconds, connections)
    client.jobs.cancel(job["id"])
    client.jobs.wait(job["id"])
    return found


def poll(client: Client, job_id: str, seconds: float, connections: int) -> dict[str, float]:
    """Run the poller and return polls a second and latencies."""
    host = client.url.removeprefix("http://")
    key = client._transport._http.headers["Authorization"]
    command = [sys.executable, "-m", "benchmarks.poller", host, f"/v1/jobs/{job_id}", key, str(seconds), str(connections)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def api_process(client: Client) -> psutil.Process:
    """Return the process that serves the API."""
    port = int(client.url.rsplit(":", 1)[1])
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [])[-2:] == ["service", "api"] and any(c.laddr.port == port for c in process.net_connections("inet")):
            return process
    raise RuntimeError("the API's process was not found on this machine")


def timed(act: Callable[[], None]) -> float:
    """Return how long it takes, seconds."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())

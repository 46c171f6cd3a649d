"""Polls one address over keep-alive connections for a while: `python -m benchmarks.poller HOST PATH AUTHORIZATION SECONDS CONNECTIONS`."""

from __future__ import annotations

import asyncio
import json
import sys
import time


async def connection(host: str, request: bytes, until: float, seconds: list[float]) -> None:
    """Ask again and again; every answer must be 200."""
    name, port = host.split(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    while time.perf_counter() < until:
        started = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        seconds.append(time.perf_counter() - started)
    writer.close()


async def main(host: str, path: str, key: str, duration: float, connections: int) -> None:
    """Run the connections and print one JSON object."""
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: {key}\r\n\r\n".encode()
    seconds: list[float] = []
    started = time.perf_counter()
    await asyncio.gather(*(connection(host, request, started + duration, seconds) for _ in range(connections)))
    elapsed = time.perf_counter() - started
    seconds.sort()
    found = {"per_second": len(seconds) / elapsed, "p50_ms": 1000 * seconds[len(seconds) // 2], "p99_ms": 1000 * seconds[int(0.99 * len(seconds))]}
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5])))

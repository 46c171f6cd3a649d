"""`python -m service {serve|api|migrate|key|doctor|openapi}`: the processes of the HTTP floor."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import structlog

from store import keys
from store.database import Database
from store.settings import Settings


def main(arguments: list[str]) -> int:
    """Run one of the processes; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="API and one worker on this machine")
    commands.add_parser("api", help="the API alone")
    commands.add_parser("migrate", help="bring the schema to the newest migration")
    commands.add_parser("openapi", help="print the OpenAPI document")
    doctor = commands.add_parser("doctor", help="say what each floor sees")
    doctor.add_argument("--json", action="store_true")
    key = commands.add_parser("key", help="make an API key of a new tenant and print it")
    key.add_argument("--name", default="first key")
    key.add_argument("--scopes", nargs="+", default=list(keys.SCOPES), choices=keys.SCOPES)
    options = parser.parse_args(arguments)
    settings = Settings()
    settings.data_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if options.command == "serve":
        return serve(settings)
    if options.command == "api":
        return api(settings)
    if options.command == "migrate":
        Database(settings.database).migrate()
        return 0
    if options.command == "openapi":
        from service.app import create_app

        print(json.dumps(create_app(settings).openapi(), indent=1))  # noqa: T201
        return 0
    if options.command == "doctor":
        from service import doctor as clinic

        return clinic.main(settings, as_json=options.json)
    database = Database(settings.database)
    database.migrate()
    with database.write() as session:
        print(keys.create(session, tenant=None, name=options.name, scopes=options.scopes)[1])  # noqa: T201
    return 0


def api(settings: Settings) -> int:
    """Serve HTTP until stopped."""
    import uvicorn

    from service.app import create_app

    logging.basicConfig(level=logging.WARNING)
    structlog.configure(
        processors=[structlog.processors.TimeStamper(fmt="iso"), structlog.processors.JSONRenderer()], logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )
    # Streams end by themselves; a restart does not wait for them.
    config = uvicorn.Config(
        create_app(settings), host=settings.host, port=settings.port, access_log=False, log_level="warning", timeout_graceful_shutdown=5, server_header=False
    )
    uvicorn.Server(config).run()
    return 0


def serve(settings: Settings) -> int:
    """Run the API and one worker, restart whichever dies, stop both with this process."""
    lock = (settings.data_folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        say(f"another service uses {settings.data_folder}; stop it, or set UNPOISON_DATA_FOLDER")
        return 1
    port = settings.port or _free_port(settings.host)
    environment = {**os.environ, "UNPOISON_PORT": str(port), "UNPOISON_DATA_FOLDER": str(settings.data_folder.absolute())}
    database = Database(settings.database)
    database.migrate()
    url = f"http://{settings.host}:{port}"
    profile = settings.data_folder / "client.json"
    with database.write() as session:
        fresh = None if keys.any_exists(session) else keys.create(session, tenant=None, name="first key", scopes=list(keys.SCOPES))[1]
    _remember(profile, url, fresh)
    commands = {"api": [sys.executable, "-m", "service", "api"], "worker": [sys.executable, "-m", "worker"]}
    children: dict[str, subprocess.Popen[bytes]] = {}
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        while not stopping:
            for name, command in commands.items():
                child = children.get(name)
                if child is None or child.poll() is not None:
                    if child is not None:
                        say(f"the {name} ended with {child.returncode}; starting it again")
                        time.sleep(1.0)
                    children[name] = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_die_with_parent)  # noqa: PLW1509
            if url and _answers(settings.host, port):
                say(f"unpoison listens on {url}  (API documentation: {url}/docs)")
                say(f"  export UNPOISON_URL={url}")
                say(f"  export UNPOISON_API_KEY={fresh}" if fresh else f"  the key is in {profile}, or make one: python -m service key")
                url = ""
            time.sleep(0.2)
    finally:
        for child in children.values():
            child.terminate()
        for child in children.values():
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
    return 0


def say(line: str) -> None:
    """Print a line for the person at the terminal."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _remember(profile: Path, url: str, secret: str | None) -> None:
    """Keep URL and first key where this user's command line finds them, readable by nobody else."""
    known = json.loads(profile.read_text()) if profile.exists() else {}
    profile.touch(mode=0o600)
    profile.write_text(json.dumps({**known, "url": url, **({"api_key": secret} if secret else {})}))


def _free_port(host: str) -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
    return port


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=0.2).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

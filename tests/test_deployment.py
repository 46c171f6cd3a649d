"""Compose file, images, house rules: read, since there is no engine to run them here."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from store.settings import Settings
from tests.stack import ROOT

ROOMS = ("core", "intake", "store", "service", "worker", "client")


def test_compose_has_every_floor_with_a_health_check() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = compose["services"]
    assert {"postgres", "redis", "s3", "api", "worker"} <= set(services)
    assert all("healthcheck" in services[name] for name in ("postgres", "redis", "s3", "worker"))
    for name in ("api", "worker"):
        settings = {key: value for key, value in services[name]["environment"].items() if key.startswith("UNPOISON_")}
        assert {key.removeprefix("UNPOISON_").lower() for key in settings} <= set(Settings.model_fields)
        assert all(known["condition"] == "service_healthy" for known in services[name]["depends_on"].values())
    named = {volume.split(":")[0] for service in services.values() for volume in service["volumes"]}
    assert named == set(compose["volumes"])
    variables = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    assert variables == set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))


if subprocess.run(["sh", "-c", "docker compose version"], capture_output=True, check=False).returncode == 0:

    def test_compose_agrees() -> None:
        environment = {"POSTGRES_PASSWORD": "x", "S3_ACCESS_KEY": "x", "S3_SECRET_KEY": "x", "PATH": "/usr/bin:/bin:/usr/local/bin"}
        subprocess.run([shutil.which("docker") or "docker", "compose", "config", "-q"], cwd=ROOT, env=environment, check=True)


def test_images_are_unprivileged_and_demand_the_sandbox() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^FROM .* AS (\w+)$", text, re.MULTILINE) == ["base", "packages", "cpu", "cuda"]
    assert "UNPOISON_SANDBOX=required" in text and re.search(r"^USER unpoison$", text, re.MULTILINE)
    assert "--require-hashes" in text and "HEALTHCHECK" in text
    for copied in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (ROOT / copied).exists()


def test_every_pin_has_a_hash_and_no_host() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    for requirement in re.split(r"\n(?=\w)", text.strip()):
        assert re.match(r"[\w.\-\[\]]+==\S+", requirement) and "--hash=sha256:" in requirement, requirement[:80]


FORBIDDEN = {"extractall", "eval", "exec", "compile"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_does_what_a_security_product_must_not(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {"pickle", "marshal", "shelve", "dill"}, path
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                owner = getattr(getattr(node.func, "value", None), "id", "")
                allowed = (owner, name) in {("re", "compile"), ("network", "eval")} or (name == "eval" and isinstance(node.func, ast.Attribute))
                assert allowed or name not in FORBIDDEN, (path, node.lineno, name)
                assert (owner, name) not in {("torch", "load"), ("np", "load"), ("yaml", "load"), ("os", "system")}, (path, node.lineno)
                for keyword in node.keywords:
                    assert not (keyword.arg in ("shell", "allow_pickle") and getattr(keyword.value, "value", False)), (path, node.lineno)


def test_the_client_needs_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import client, client.cli, sys; print([n for n in ('torch', 'core', 'store') if n in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_intake_needs_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import intake.__main__, sys; print([n for n in ('torch', 'core', 'store') if n in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"

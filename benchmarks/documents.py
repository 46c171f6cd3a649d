"""Writes what is generated from declarations: docs/openapi.json, docs/methods/, docs/problems.md; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from core import catalog
from core.errors import EngineError
from service.app import create_app
from service.problems import CATALOGUE
from store.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


def documents() -> dict[Path, str]:
    """Return every generated document by path."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_folder=Path(folder), database_url="", queue_url="", objects_url="")
        found = {ROOT / "docs" / "openapi.json": json.dumps(create_app(settings).openapi(), indent=1) + "\n"}
    for name, method in catalog.methods().items():
        found[ROOT / "docs" / "methods" / f"{name}.md"] = page(method)
    found[ROOT / "docs" / "problems.md"] = problems()
    found[ROOT / "docs" / "settings.md"] = settings_page()
    return found


def page(method: catalog.Method) -> str:
    """Return the page of one method."""
    described = method.describe()
    lines = [f"# {method.title}", "", f"`{method.name}`, {method.kind.value}. {method.summary}", "", f"*{method.paper}*", ""]
    if method.caution:
        lines += [f"**Caution:** {method.caution}", ""]
    if method.needs:
        lines += ["Needs: " + ", ".join(need.value.replace("_", " ") for need in method.needs) + ".", ""]
    lines += ["| parameter | default | bounds | what it does |", "|---|---|---|---|"]
    for name, part in described["params_schema"]["properties"].items():
        if name == "method":
            continue
        default = json.dumps(described["defaults"][name]) if name in described["defaults"] else "required"
        words = ". ".join(filter(None, [part.get("title", ""), part.get("description", "")]))
        lines.append(f"| `{name}` | `{default}` | {bounds(part)} | {words} |")
    return "\n".join(lines) + "\n"


def bounds(part: dict[str, object]) -> str:
    """Return a parameter's bounds in words."""
    pieces = [part, *part.get("anyOf", [])]  # type: ignore[misc]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    words = [f"{sign} {piece[key]}" for piece in pieces for key, sign in signs.items() if key in piece]
    words += [" or ".join(f"`{value}`" for value in piece["enum"]) for piece in pieces if "enum" in piece]
    return ", ".join(words)


def problems() -> str:
    """Return the page of error codes."""
    lines = [
        "# Problems",
        "",
        "Every error is `application/problem+json` (RFC 9457) with one of these codes.",
        "",
        "| code | status | meaning | retry |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{code}` | {kind.status} | {kind.title} | {'yes' if kind.retryable else ''} |" for code, kind in CATALOGUE.items()]
    lines += [
        "",
        "## Jobs",
        "",
        "A job that ends as `failed` or `crashed` has an `error` with one of these codes, with what was wrong in `detail` and what to do in `advice`.",
        "",
        "| code | meaning |",
        "|---|---|",
    ]
    lines += [f"| `{code}` | {meaning} |" for code, meaning in endings().items()]
    return "\n".join(lines) + "\n"


def endings() -> dict[str, str]:
    """Return the codes that a job may end with, and what each means: the engine's, and those of whoever watches over it."""
    told = {error.code: (error.__doc__ or "").splitlines()[0] for error in EngineError.__subclasses__()}
    return told | {
        "not_purified": "The purified model is worse than the suspect one, or its backdoor still works; it is kept as evidence, not handed out.",
        "timeout": "The job ran longer than its `max_seconds`.",
        "worker_lost": "The job's process died several times in a row without getting further; the job is `crashed` and can be retried.",
    }


def settings_page() -> str:
    """Return the page of settings."""
    lines = ["# Settings", "", "Environment variables; the defaults are a laptop's.", "", "| variable | default | what it does |", "|---|---|---|"]
    for name, info in Settings.model_fields.items():
        default = "~/.local/share/unpoison" if name == "data_folder" else str(info.default)
        lines.append(f"| `UNPOISON_{name.upper()}` | `{default or '(empty)'}` | {info.description} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the documents, or say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path, text in documents().items():
        if path.exists() and path.read_text() == text:
            continue
        stale.append(path.relative_to(ROOT))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if check and stale:
        print(f"out of date: {', '.join(map(str, stale))}; run `make documents`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

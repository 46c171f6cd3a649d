"""Measured cells as Markdown: the tables that people read."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

PLAIN = "none"


def models(table: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown rows: ours beside the paper's."""
    lines = [
        "| attack | after | setting of | BA | BA, target excluded | ASR | without trigger | PA | worst class | poisoned | n | seconds | paper: BA | paper: ASR |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        for column in [PLAIN, *(one["name"] for one in table.get("columns", []))]:
            cells = [one for one in found if one["cell"]["row"] == row["name"] and one["cell"]["column"] == column]
            if not cells:
                continue
            refused = sorted({one["refused"]["code"] for one in cells if "refused" in one})
            shown = [one["after"] or one["before"] for one in cells if "refused" not in one]
            paper = row.get("paper", {}).get(column, {})
            paper_ba = paper.get("ba", paper.get("ba_excluding_target"))
            marked = f"{paper_ba}{' (target excluded)' if 'ba' not in paper else ''}" if paper_ba is not None else ""
            counts = cells[0]["counts"]
            seconds = statistics.mean(one["defense_seconds"] if "defense_seconds" in one else one["victim_seconds"] for one in cells)
            lines.append(
                f"| {row['name']} | {'' if column == PLAIN else column}{' '.join(['', *refused])} | {row.get('from', '')} | {spread(shown, 'ba')} | {spread(shown, 'ba_excluding_target')} | "
                f"{spread(shown, 'asr')} | {spread(shown, 'asr_without_trigger')} | {spread(shown, 'pa')} | {worst(cells)} | {counts['n_poisoned'] if counts else ''} | {len(cells)} | {seconds:.0f} | "
                f"{marked} | {paper.get('asr', '')} |"
            )
    return lines


def splits(table: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown rows of a table of cleansers: what they flag, what they say of the set, what is left of it."""
    lines = [
        "| training set | method | poison found | clean flagged | precision | verdict | poison left | clean lost | n | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        for column in table["columns"]:
            cells = [one for one in found if one["cell"]["row"] == row["name"] and one["cell"]["column"] == column["name"] and "split" in one]
            if not cells:
                continue
            shown = [one["split"] for one in cells]
            target = (row.get("attack") or {}).get("target")
            verdicts = [one["verdict"] + (" (right class)" if one["target"] is not None and one["target"] == target else "") for one in shown]
            lines.append(
                f"| {row['name']} | {column['name']} | {spread(shown, 'poison_recall')} | {spread(shown, 'clean_flagged')} | {spread(shown, 'poison_precision')} | "
                f"{', '.join(sorted(set(verdicts))).replace('_', ' ')} | {spread(shown, 'poison_left')} | {spread(shown, 'clean_lost')} | {len(cells)} | "
                f"{statistics.mean(one['defense_seconds'] for one in cells):.0f} |"
            )
    return lines


def worst(found: list[dict[str, Any]]) -> str:
    """Return the mean change, in points, of the class that a defense cost most; empty where nothing was defended."""
    changes = [
        min(100 * (now["value"] - was["value"]) for was, now in zip(one["before"]["per_class"], one["after"]["per_class"], strict=True))
        for one in found
        if one["after"]
    ]
    return f"{statistics.mean(changes):+.1f}" if changes else ""


def spread(found: list[dict[str, Any]], name: str) -> str:
    """Return mean ± standard deviation of a rate, in percent; empty where it does not exist."""
    values = [100 * one[name]["value"] for one in found if name in one and one[name]["value"] is not None]
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def machines(found: Iterable[dict[str, Any]]) -> str:
    """Return on what cells were measured, in words: each kind of machine with the commits it ran."""
    commits: dict[str, set[str]] = {}
    for one in found:
        commits.setdefault(f"{one['processor']}, torch {one['torch']}, {one['threads']} threads a process", set()).add(one["commit"])
    return "Measured on: " + "; ".join(f"{machine}, commit {', '.join(sorted(ran))}" for machine, ran in sorted(commits.items())) + "."

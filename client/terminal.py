"""What the command line prints. Names and messages come from uploads and other users: they are shown, never interpreted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from client.flows import Json
from client.sessions import Client

out, err = Console(), Console(stderr=True)
# A description is a name, too: no format, no markup.
TITLE = TextColumn("{task.description}", markup=False)


@dataclass
class Output:
    """How to print, and where the service is."""

    as_json: bool = False
    quiet: bool = False
    url: str | None = None
    api_key: str | None = None

    def client(self) -> Client:
        """Return a client for the chosen service."""
        return Client(self.url, self.api_key)

    def show(self, items: list[Json] | Json, columns: list[str]) -> None:
        """Print as a table of these columns (of everything if there are none), as JSON (`--json`), or ids only (`-q`)."""
        rows = items if isinstance(items, list) else [items]
        if self.as_json:
            print(json.dumps(items))
        elif self.quiet:
            for row in rows:
                print(row.get("id", row.get("name", "")))
        elif isinstance(items, list):
            table = Table(*columns)
            for column in table.columns[:1]:
                # An id that is cut cannot be pasted into the next command.
                column.no_wrap = True
                column.overflow = "fold"
                column.min_width = max((len(cell(row.get(columns[0]))) for row in rows), default=0)
            for row in rows:
                table.add_row(*(cell(row.get(column)) for column in columns))
            out.print(table)
        else:
            table = Table(show_header=False)
            for name in columns or items:
                table.add_row(cell(name), cell(items.get(name)))
            out.print(table)

    @contextmanager
    def progress(self, *columns: ProgressColumn) -> Iterator[Progress]:
        """Draw bars with their title and these columns while something goes on, unless ids are all that is wanted."""
        with Progress(TITLE, BarColumn(), *columns, TimeRemainingColumn(), console=err, transient=True, disable=self.quiet) as bars:
            yield bars

    @contextmanager
    def transfer(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Draw a bar while bytes go over the line; what is yielded takes how many have, of how many."""
        with self.progress(DownloadColumn(), TransferSpeedColumn()) as bars:
            bar = bars.add_task(plain(title).plain, total=None)
            yield lambda done, total: bars.update(bar, completed=done, total=total)


def plain(text: str) -> Text:
    """Return text in which nothing is markup; characters that a terminal obeys, or that turn the direction of writing, are shown by their number."""
    return Text("".join(char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text))


def say(text: str, *, console: Console = err, style: str = "") -> None:
    """Print lines as they are, not broken where a terminal ends."""
    console.print(plain(text), style=style, soft_wrap=True)


def cell(value: Any) -> Text:
    """Return what a table says of a value, at most 300 characters of it."""
    text = json.dumps(value) if isinstance(value, (dict, list)) else "" if value is None else str(value)
    return plain(text if len(text) <= 300 else f"{text[:297]}…")

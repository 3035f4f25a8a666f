"""What commands print: one JSON document, JSON lines, tables, and progress on anything that takes a while."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

from pydantic import BaseModel

Progress = Callable[[str, int, int], None]
"""(what is being done, bytes or steps done, of how many)."""


def print_json(value: Any) -> None:
    """Print one value as one line of JSON, nulls left out."""
    print(json.dumps(_plain(value), ensure_ascii=False), flush=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; columns whose cells are all numbers stand to the right."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, column in enumerate(columns):
        numbers = bool(rows) and all(row[position][:1].isdigit() or row[position] in ("", "-") for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text: brackets in a name are not markup
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if title:
        console.print(Text(title, style="bold"))
    console.print(table)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress on stderr while it is a terminal; several things may progress one after the other."""
    if not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415
    from rich.progress import Progress as Bars  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bars:
        shown: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=total)
            bars.update(shown[what], completed=done, total=total)

        yield advance


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Show on a terminal that something of unknown length is going on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415

    with Console(stderr=True).status(what):
        yield


def size(count: float) -> str:
    """A number of bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

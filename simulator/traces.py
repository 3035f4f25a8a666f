"""Traces of real requests, as they are published: the Azure LLM inference traces, and BurstGPT.

An Azure trace has the columns `TIMESTAMP,ContextTokens,GeneratedTokens` (the first a date and a time), BurstGPT
`Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type` (the first in seconds). Which one it is, its
header says; further columns are ignored.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import TextIO

from schemas.capacity import TOKENS_MAX
from schemas.errors import ErrorCode, ResplitError

TRACE_ROWS_MAX = 2_000_000
"""More than the first file of BurstGPT has; rows in memory take some hundred bytes each."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    at_s: float
    """Since the first one."""
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class _Form:
    """The columns of one format, and how its times are written."""

    time: str
    prompt: str
    output: str
    seconds: Callable[[str], float]

    @property
    def columns(self) -> tuple[str, str, str]:
        return (self.time, self.prompt, self.output)


def _clock_s(text: str) -> float:
    """A date and a time; without a zone it is UTC, for differences are all that matters."""
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()


AZURE = _Form("TIMESTAMP", "ContextTokens", "GeneratedTokens", _clock_s)
BURSTGPT = _Form("Timestamp", "Request tokens", "Response tokens", float)


def read_trace(path: Path) -> tuple[TraceRow, ...]:
    """The requests of a trace in order of time, the first at 0 s.

    A row without output is a request that failed when it was recorded, and is left out. Raises
    `ResplitError(INVALID_REQUEST)` naming the file and, where there is one, the line, the column and the value.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = sorted(_rows(file, path))
    except OSError as error:
        raise _refused(
            f"cannot read {path}: {error.strerror}; it is a trace as Azure or BurstGPT publish it"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise _refused(f"{path} is not a CSV file: {error}") from error
    if not found:
        raise _refused(f"{path} has no row with output")
    begin_s = found[0][0]
    return tuple(TraceRow(round(at_s - begin_s, 6), prompt, output) for at_s, prompt, output in found)


def _rows(file: TextIO, path: Path) -> Iterator[tuple[float, int, int]]:
    reader = csv.DictReader(file)
    names = reader.fieldnames or []
    form = next((form for form in (AZURE, BURSTGPT) if set(form.columns) <= set(names)), None)
    if form is None:
        known = " nor ".join(", ".join(form.columns) for form in (AZURE, BURSTGPT))
        shown = ", ".join(names)[:200]
        raise _refused(f"{path}, line 1: the columns are neither {known}, but {shown!r}")
    for number, row in enumerate(reader):
        where = f"{path}, line {reader.line_num}"
        if number == TRACE_ROWS_MAX:
            raise _refused(f"{where}: a trace has {TRACE_ROWS_MAX} rows at most; take a part of it")
        at_s = _read(form.seconds, row, form.time, where, "a time")
        prompt, output = (_read(_count, row, name, where, "a number of tokens") for name in (form.prompt, form.output))
        if prompt and output:
            yield at_s, int(prompt), int(output)


def _read(reading: Callable[[str], float], row: dict[str, str], column: str, where: str, what: str) -> float:
    text = row[column]
    try:
        value = reading(text)
    except (ValueError, TypeError, OverflowError):
        value = float("nan")
    if not isfinite(value):
        shown = repr(text)[:60]
        raise _refused(f"{where}, column {column!r}: {shown} is not {what}")
    return value


def _count(text: str) -> float:
    value = int(text)
    if not 0 <= value <= TOKENS_MAX:
        raise ValueError(text)
    return value


def _refused(message: str) -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, message, "workload.trace")

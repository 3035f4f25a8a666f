"""Tables of docs/benchmarks.md, docs/reliability.md and the README, from the results: `python -m benchmarks.page`."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.pages import (
    costs,
    faults,
    gateway,
    live,
    load,
    peers,
    planners,
    residency,
    scenarios,
    services,
    soak,
    split,
)
from benchmarks.pages.wording import between, hardware_of, under
from benchmarks.table import RESULTS, Row

ROOT = Path(__file__).parents[1]
BENCHMARKS, RELIABILITY, README = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "reliability.md", ROOT / "README.md"

OF_ROWS: dict[str, Callable[[list[Row]], list[str]]] = {
    "resplit": live.resplit,
    "sealed": costs.sealed,
    "handover": live.handover,
    "chat": live.chat,
    "overhead": costs.overhead,
    "sealing": costs.sealing,
    "prediction": planners.prediction,
    "shortlist": planners.shortlist,
    "validation": planners.validation,
    "worlds": planners.worlds,
    "disks": residency.placed,
    "residency": residency.traces,
    "ahead": residency.ahead,
    "lora": residency.variants,
}
"""What is told by its rows alone, by the name of the result and of the markers in `BENCHMARKS`."""
OF_RESULTS: dict[str, Callable[[Row], list[str]]] = {
    "gateway": gateway.tables,
    "overload": load.overload,
    "control_plane": load.control_plane,
    "peers": peers.tables,
    "services": services.tables,
}
"""What tells of more."""
COMPARED = {"two-tier": "two-tier", "many-models": "residency"}
"""Simulated worlds of services: the folder of their results, by marker."""


def main() -> None:
    measured = _read("split")
    _put(BENCHMARKS, "split", [hardware_of(measured), "", *split.tables(measured["rows"])])
    _put(README, "bench", [hardware_of(measured), "", *split.decode(measured["rows"])])
    _put(BENCHMARKS, "planning", planners.planning(_read("planning")))
    for name, of_rows in OF_ROWS.items():
        result = _read(name)
        _put(BENCHMARKS, name, [under(result), "", *of_rows(result["rows"])])
    for name, of_result in OF_RESULTS.items():
        result = _read(name)
        _put(BENCHMARKS, name, [under(result), "", *of_result(result)])
    _put(BENCHMARKS, "scenarios", scenarios.lines_of(RESULTS / "scenarios"))
    for name, folder in COMPARED.items():
        _put(BENCHMARKS, name, services.compared(RESULTS / folder))
    _put(RELIABILITY, "faults", faults.table(_read("faults")))
    soaked = _read("soak")
    _put(RELIABILITY, "soak", [under(soaked), "", *soak.table(soaked)])


def _read(name: str) -> Row:
    result: Row = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def _put(page: Path, name: str, lines: list[str]) -> None:
    page.write_text(between(page.read_text(), name, lines))


if __name__ == "__main__":
    main()

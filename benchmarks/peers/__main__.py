"""Resplit beside llama.cpp RPC and Ray: one model, the same weights, one thread a stage, in one run.

    python -m benchmarks.peers [--only PART ...] [--rounds N] [--folder DIR]

The parts are `int4`, `int8` and `fp32`, in which every contender is up at once and each prompt goes to all in turn,
and `faults`: the process of the last stage is killed, hangs, and gets a third of its time. Whatever cannot take part
is in the table with the reason. Tokens per second, TTFT and outcomes are as a client sees them; ratios are medians of
the rounds' ratios, between which the true median lies with 95 % if there are six rounds. Memory is that of the
processes that compute, and of all that the system needs. `benchmarks.peers.install` installs the others.

Rows of parts that were not run this time stay in `results/peers.json` as they were measured.
"""

import argparse
import asyncio
import json
import os
import signal
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from benchmarks.model import PARAMETERS
from benchmarks.peers import faults, speed
from benchmarks.peers.install import Installed, installed
from benchmarks.peers.weights import gguf_of
from benchmarks.table import RESULTS, Row, show, write

Part = Literal["int4", "int8", "fp32", "faults"]
PARTS: tuple[Part, ...] = get_args(Part)
BUDGETS_S: dict[Part, float] = {"int4": 240, "int8": 240, "fp32": 270, "faults": 360}
"""No round, or run of a fault, begins after so long; what is under way then has half as long again."""
ROUNDS = 6
FAULT_RUNS = 3
TITLE = f"Resplit beside llama.cpp RPC and Ray, {PARAMETERS // 10**6} M parameters, one thread a stage"


async def run(part: Part, folder: Path, there: Installed, rounds: int) -> list[Row]:
    """The rows of a part."""
    budget_s = BUDGETS_S[part]
    with tempfile.TemporaryDirectory() as scratch:
        if part != "faults":
            return await speed.measure(folder, part, there, Path(scratch), rounds, budget_s)
        found: list[Row] = []
        try:
            async with asyncio.timeout(1.5 * budget_s):
                async for row in faults.measure(folder, there, Path(scratch), min(rounds, FAULT_RUNS), budget_s):
                    found.append(row)
        except TimeoutError:
            found.append({"part": part, "name": "what was left", "skipped": f"given up after {1.5 * budget_s:g} s"})
        return found


def table(part: Part, rows: list[Row]) -> None:
    """A part, as people read it."""
    hidden = ("part", "system", "layout", "each_tokens_per_s", "each_ttft_s", "parted")
    shown = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    measured = [row for row in shown if "skipped" not in row and "target" not in row]
    if part == "faults":
        spread = [_run(row, number) for row in measured if "outcomes" in row for number in range(row["runs"])]
        show(f"{part}: killed and hanging", spread)
        show(f"{part}: a third of the time", [row for row in measured if "outcomes" not in row])
    else:
        show(part, measured)
    for title, key in (("aimed at", "target"), ("took no part", "skipped")):
        if some := [row for row in shown if key in row]:
            show(f"{part}: {title}", some)


def _run(row: Row, number: int) -> Row:
    """One run of a fault."""
    each = {
        "outcome": "outcomes",
        "heard after s": "heard_s",
        "what was done": "mended_by",
        "tokens again after s": "answers_s",
    }
    return {"name": row["name"], "fault": row["fault"], **{title: row[key][number] for title, key in each.items()}}


def kept(parts: tuple[Part, ...]) -> tuple[list[Row], dict[str, Row]]:
    """The rows, and when and under which load they were measured, of parts that are not run now."""
    path = RESULTS / "peers.json"
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "parts": {}}
    rows = [row for row in before["rows"] if row["part"] not in parts]
    return rows, {part: told for part, told in before["parts"].items() if part not in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="some of the parts")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="prompts for each precision, at most")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever is asked to end ends what it started
    there = installed()
    for part in arguments.only:
        if part != "faults" and there.missing("llama.cpp") is None:
            gguf_of(arguments.folder, part, there.python)  # before anything is timed
        began, before = time.monotonic(), os.getloadavg()
        rows = asyncio.run(run(part, arguments.folder, there, arguments.rounds))
        told = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "took_s": round(time.monotonic() - began),
            "load_average_before": before,
            "load_average": os.getloadavg(),
        }
        table(part, rows)
        others, parts = kept((part,))  # written part by part: what was measured is there whatever comes after
        more = {"peers": there.noted, "parts": {**parts, part: told}, "load_average": os.getloadavg()}
        write("peers", TITLE, sorted([*others, *rows], key=lambda row: PARTS.index(row["part"])), **more)


if __name__ == "__main__":
    main()

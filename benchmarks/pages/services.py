"""Tables of services of two tiers, as lines of docs/benchmarks.md."""

import json
from pathlib import Path

from benchmarks.table import Row
from simulator.table import Grid, markdown


def tables(result: Row) -> list[str]:
    """Placing them, and foretelling their delays."""
    return [*_speed(result["rows"]), "", *_predicted(result["predicted"])]


def _speed(rows: list[Row]) -> list[str]:
    """How long it takes to place services."""
    lines = ["| what | median | p95 | worst | over | target |", "|---|---:|---:|---:|---|---|"]
    for row in rows:
        reached = [row[key] <= row["target"] for key in ("median", "p95", "worst")]
        verdict = (
            "**missed**",
            "met in the median, **missed** at 95 %",
            "met at 95 %, **missed** in the worst",
            "met",
        )[sum(reached)]
        unit = row["unit"]
        times = " | ".join(f"{row[key]:g} {unit}" for key in ("median", "p95", "worst"))
        lines.append(f"| {row['name']} | {times} | {row['runs']} | <= {row['target']:g} {unit}: {verdict} |")
    return lines


def _predicted(rows: list[Row]) -> list[str]:
    """How many of the jobs that waited longer were predicted to."""
    lines = [
        "| server | delay, slots | longer | predicted, corrected | the paper's | within 2x |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        met = "met" if 0.5 <= row["corrected"] <= 2.0 else "**missed**"
        lines.append(
            f"| {row['name']} | {row['delay_slots']:g} | {row['longer']:.2%} | {row['corrected']:.2f} times | "
            f"{row['paper']:.2g} times | {met} |"
        )
    return lines


def compared(folder: Path) -> list[str]:
    """Every scenario that was run, with its tables."""
    lines: list[str] = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        lines += ["", f"### {found['title']}", "", f"`{found['command']}`, {found['at'][:10]}; seeds {found['seeds']}."]
        for each in found["grids"]:
            shown = Grid(each["title"], tuple(each["header"]), tuple(tuple(row) for row in each["rows"]))
            lines += ["", f"**{shown.title}**", "", *markdown(shown)]
        for plot in found.get("plots", ()):
            lines += ["", f"![{plot['caption']}]({plot['file']})"]
    return lines[1:]

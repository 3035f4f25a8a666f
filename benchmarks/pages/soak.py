"""The table of docs/reliability.md: what a soak showed, misses included."""

from benchmarks.soak.shown import shown
from benchmarks.table import Row


def table(result: Row) -> list[str]:
    """The rows as they are read, how often each fault was done, and how requests of each kind ended."""
    lines = ["| what | bound | found | verdict |", "|---|---|---|---|"]
    for row in shown(result["rows"]):
        verdict = row["verdict"].replace("missed", "**missed**")
        lines.append(f"| {row['name']} | {row['bound']} | {row['found']} | {verdict} |")
    faults = ", ".join(f"{name} {count}" for name, count in result["faults"].items())
    asked = [
        f"{kind}: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())}"
        for kind, outcomes in result["requests"].items()
    ]
    which = [f"- {row['name']}: {', '.join(map(str, row['which']))}" for row in result["rows"] if row.get("which")]
    return [*lines, "", *which, f"- faults: {faults}", *(f"- {line}" for line in asked)]

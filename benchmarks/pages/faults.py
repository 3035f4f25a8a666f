"""Faults, each with its promise."""

import statistics

from benchmarks.table import Row


def table(result: Row) -> list[str]:
    """What benchmarks.faults measured, misses included."""
    hardware = result["hardware"]
    loads = [row["load_average"] for row in result["rows"] if "load_average" in row]
    lines = [
        f"{result['title']}; {hardware['cores']} cores of {hardware['cpu']}, which all processes share, the streams' "
        f"readers included; load average {min(loads, default=0)} to {max(loads, default=0)}; `{result['command']}`, "
        f"{result['at'][:10]}.",
        "",
        "| fault | promise | bound | runs | lost / requests | p50 s | p99 s | max s | worst gap s | verdict |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        figures = [f"{row[key]:.2f}" if key in row else "-" for key in ("p50_s", "p99_s", "max_s", "gap_max_s")]
        lost = f"{row['lost']} / {row['requests']}" if "lost" in row else "-"
        verdict = row["verdict"].replace("missed", "**missed**")
        lines.append(
            f"| {row['fault']} | {row['promise']} | {row['bound']} | {row['runs']} | {lost} | {' | '.join(figures)} | "
            f"{verdict} |"
        )
    return [*lines, *_further(result["rows"])]


def _further(rows: list[Row]) -> list[str]:
    """What some faults tell besides: how it was at each step, how many plans, at which pace. A line for each fault."""
    lines = []
    for row in rows:
        at: dict[str, list[float]] = {}
        for step, sample in zip(row.get("steps", []), row["samples_s"] if "steps" in row else [], strict=True):
            at.setdefault(step, []).append(sample)
        figures: dict[str, list[float]] = {}
        for told in row.get("told", []):
            for name, value in told.items():
                figures.setdefault(name.replace("_", " "), []).append(value)
        said = [f"{step} {_middle_and_worst(samples)} s" for step, samples in at.items()]
        said += [f"{name} {_middle_and_worst(values)}" for name, values in figures.items()]
        if said:
            lines.append(f"- {row['name']} (median, worst of runs): {'; '.join(said)}")
    return ["", *lines] if lines else []


def _middle_and_worst(values: list[float]) -> str:
    return f"{statistics.median(values):.3g}, {max(values):.3g}"

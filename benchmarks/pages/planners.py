"""How well and how fast it is decided, and how well the model and the simulator foretell what happens."""

from benchmarks.table import Row


def planning(result: Row) -> list[str]:
    """What benchmarks.planning measured, misses included."""
    hardware = result["hardware"]
    lines = [
        f"{result['title']}; {result['seeds']} seeds ({result['exact_seeds']} for HiGHS and the subset programme); CPU "
        f"seconds of one call on one thread of {hardware['cpu']}; `{result['command']}`, {result['at'][:10]}.",
        "",
        "| nodes / sites / blocks, room | solver | found | proven | gap | worst | CPU s | worst | target |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        size = f"{row['nodes']:,} / {row['sites']} / {row['blocks']}, {row['room']}"
        gaps = [f"{row[key]:.1%}" if row[key] is not None else "-" for key in ("gap_median", "gap_worst")]
        target = ""
        if "gap_target" in row:
            met = row["gap_worst"] <= row["gap_target"] and row["seconds_worst"] <= row["seconds_target"]
            half = row["gap_median"] <= row["gap_target"] and row["seconds_median"] <= row["seconds_target"]
            verdict = "met" if met else "met in the median, **missed** in the worst" if half else "**missed**"
            target = f"gap <= {row['gap_target']:.0%} in {row['seconds_target']:g} s: {verdict}"
        lines.append(
            f"| {size} | {row['name']} | {row['found']} | {row['proven']} | {gaps[0]} | {gaps[1]} | "
            f"{row['seconds_median']:.3f} | {row['seconds_worst']:.3f} | {target} |"
        )
    return lines


def prediction(rows: list[Row]) -> list[str]:
    lines = [
        "| cut | sequences | prompt | TPOT, ms: predicted | measured | off: new cut | before | after | TTFT, ms: "
        "predicted | measured | off: new cut | before | after |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "target" in row:
            continue
        cells = [row["name"], str(row["sequences"]), str(row["prompt"])]
        for figure in ("tpot", "ttft"):
            cells += [f"{row[f'{figure}_ms']:.0f}", f"{row[f'{figure}_measured_ms']:.0f}"]
            cells += [f"{row[f'{figure}_error_{when}']:+.0%}" for when in ("new", "before", "after")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| median of the size of the error (worst) | new cut | before | after | target |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "target" in row:
            figure = row["figure"]
            found = [f"{row[f'{figure}_error_{w}']:.0%} ({row[f'worst_{w}']:.0%})" for w in ("new", "before", "after")]
            verdict = "met" if row[f"{figure}_error_before"] <= row["target"] else "**missed**"
            lines.append(f"| {figure.upper()} | {' | '.join(found)} | before <= {row['target']:.0%}: {verdict} |")
    return lines


def validation(rows: list[Row]) -> list[str]:
    lines = [
        "| requests/s | requests | figure | p50, ms: real | simulated | off "
        "| p95, ms: real | simulated | off | target |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        figure = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "total_ms": "whole answer"}[row["figure"]]
        cells = [f"{row['rate_per_s']:g}", str(row["requests"]), figure]
        for label in ("p50", "p95"):
            cells += [
                f"{row[f'{label}_real']:.0f}",
                f"{row[f'{label}_simulated']:.0f}",
                f"{row[f'{label}_error']:+.0%}",
            ]
        verdicts = [f"{label} {'met' if row[f'{label}_met'] else '**missed**'}" for label in ("p50", "p95")]
        lines.append(f"| {' | '.join(cells)} | {', '.join(verdicts)} |")
    return lines


def shortlist(rows: list[Row]) -> list[str]:
    lines = [
        "| nodes | sites | seeds | looked for among | a token, ms | worse than the best with all links known | worst | "
        "CPU s | worst |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        gaps = [f"{row[key]:.1%}" if key in row else "-" for key in ("gap", "gap_worst")]
        size = [f"{row['nodes']:,}", str(row["sites"]), str(row["seeds"]), row["name"], f"{row['token_ms']:.1f}"]
        seconds = [f"{row['cpu_s']:.2f}", f"{row['cpu_s_worst']:.2f}"]
        lines.append(f"| {' | '.join([*size, *gaps, *seconds])} |")
    return lines


def worlds(rows: list[Row]) -> list[str]:
    lines = [
        "| world | nodes | virtual s | requests | completed | plans | events | wall s | of these deciding | "
        "us per event, without | memory, MB | target |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        target = "-"
        if "target_s" in row:
            target = f"<= {row['target_s']:g} s: {'met' if row['wall_s'] <= row['target_s'] else '**missed**'}"
        lines.append(
            f"| {row['name']} | {row['nodes']:,} | {row['simulated_s']:,.0f} | {row['requests']:,} | "
            f"{row['completed']:,} | {row['plans']} | {row['events']:,} | {row['wall_s']:,.0f} | "
            f"{row['deciding_s']:,.0f} | {row['us_per_event']:.0f} | {row['memory_mb']:,} | {target} |"
        )
    return lines

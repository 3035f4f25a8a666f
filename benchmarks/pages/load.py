"""Tables of docs/benchmarks.md: more load than there is room for, and more nodes than anybody has."""

from benchmarks.table import Row


def overload(result: Row) -> list[str]:
    """Goodput and latencies by load and class, then whether the promises hold."""
    bounds = ", ".join(f"{name} {bound / 1e3:.2f} s" for name, bound in result["bounds_ms"].items())
    lines = [
        f"Capacity: {result['capacity_per_s']:g} requests/s, asked one after the other. In time is: {bounds}.",
        "",
        "| load | class | offered/s | in time/s | share | refused | too late | failed | TTFT ms: 50 % | 95 % | 99 % | "
        "ms a token: 50 % | 95 % | 99 % | refused after ms: 50 % | 99 % | asked late, 99 %, ms | asking, cores |",
        "|---:|---|" + "---:|" * 16,
    ]
    figures = [
        *("offered_per_s", "goodput_per_s", "good_share", "refused", "too_late", "failed"),
        *(f"{what}_p{q}" for what in ("ttft_ms", "tpot_ms") for q in (50, 95, 99)),
        *("refused_ms_p50", "refused_ms_p99", "late_p99_ms", "asking_cores"),
    ]
    for row in result["rows"]:
        cells = " | ".join(f"{row[name]:g}" if row.get(name) is not None else "" for name in figures)
        lines.append(f"| {row['factor']:g}x | {row.get('class', 'all')} | {cells} |")
    return [*lines, "", *(f"- {said}" for said in result["verdicts"])]


def control_plane(result: Row) -> list[str]:
    """What a heartbeat and a decision cost, by how many nodes there are."""
    columns = {
        "heartbeats_per_s": "heartbeats/s",
        "behind_s": "generator behind, s",
        "orchestrator_us": "orchestrator, µs a heartbeat",
        "orchestrator_cores": "cores",
        "ticks_cores": "of these without any",
        "agent_us": "each agent, µs a heartbeat",
        "agent_cores": "cores",
        "nats_cores": "nats-server, cores",
        "decision_p50_ms": "decision ms: 50 %",
        "decision_p95_ms": "95 %",
        "status_p50_ms": "status, ms",
        "lost_s": "silence to lost, s",
        "planned_s": "to another plan in force, s",
        "orchestrator_mb": "orchestrator, MB",
        "agent_mb": "agent, MB",
        "known_s": "all known after s",
    }
    lines = [f"| nodes | {' | '.join(columns.values())} |", "|---:|" + "---:|" * len(columns)]
    for row in result["rows"]:
        cells = " | ".join("no answer" if row[name] is None else f"{row[name]:g}" for name in columns)
        lines.append(f"| {row['nodes']:,} | {cells} |")
    return lines

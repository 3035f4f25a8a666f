"""What safety and orchestration cost."""

from benchmarks.sealing import FOR_A_TOKEN
from benchmarks.table import Row

SEALING_TARGET = 0.03
"""How much longer a token may take where its request is sealed."""
OVERHEAD_TARGET = 0.02


def sealed(rows: list[Row]) -> list[str]:
    lines = [
        "| what | MB | rounds | open, ms | sealed, ms | sealed / open | interval from | to |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        both = "".join(f" {row[key]} |" if key in row else " |" for key in ("ratio", "ratio_low", "ratio_high"))
        in_open = row.get("open_ms", "")
        lines.append(
            f"| {row['name']} | {row['size_mb']:.0f} | {row['rounds']} | {in_open} | {row['sealed_ms']} |{both}"
        )
    return lines


def sealing(rows: list[Row]) -> list[str]:
    names = {"ttft_s": ("TTFT, ms", 1e3), "rate": ("tokens/s", 1.0), "cpu_ms": ("processor, ms a token", 1.0)}
    heads = " | ".join(f"{title}: open | sealed | sealed / open | interval" for title, _ in names.values())
    lines = [
        f"| model | sequences | rounds | {heads} | cost of a token, <= {SEALING_TARGET:.0%} |",
        f"|---|---:|---:|{'---:|---:|---:|---|' * len(names)}---|",
    ]
    operations = [row for row in rows if "us" in row]
    for row in rows:
        if "us" in row:
            continue
        shown = [
            f"{row[f'{name}_open'] * scale:.1f} | {row[f'{name}_sealed'] * scale:.1f} | {_ratio(row, name)}"
            for name, (_, scale) in names.items()
        ]
        cells = [row["name"], str(row["sequences"]), str(row["rounds"]), *shown, _cost(row)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| by itself | µs, over and over | µs, caches cold |", "|---|---:|---:|"]
    lines += [f"| {row['name']} | {row['us']:.1f} | {row['cold_us']:.1f} |" for row in operations]
    cold_ms = sum(row["cold_us"] for row in operations if row["name"] in FOR_A_TOKEN) / 1e3
    shares = ", ".join(
        f"{cold_ms * row['rate_open'] / 1e3:.1%} of a token of {row['name']}"
        for row in rows
        if row.get("sequences") == 1
    )
    return [
        *lines,
        "",
        f"Cold, what a token alone in its step costs, at the ingress and the client: {cold_ms:.2f} ms, {shares}.",
    ]


def _ratio(row: Row, name: str) -> str:
    return f"{row[f'{name}_ratio']:.3f} | {row[f'{name}_ratio_low']:.3f} to {row[f'{name}_ratio_high']:.3f}"


def _cost(row: Row) -> str:
    """How much longer a token takes sealed, and how much more of a processor; and as far as the intervals say, whether
    that is within the target."""
    slower = [1 / row[f"rate_ratio{end}"] - 1 for end in ("", "_high", "_low")]
    dearer = [row[f"cpu_ms_ratio{end}"] - 1 for end in ("", "_low", "_high")]
    said = []
    for what, (middle, low, high) in (("time", slower), ("processor", dearer)):
        verdict = "met" if high <= SEALING_TARGET else "**missed**" if low > SEALING_TARGET else "not shown either way"
        said.append(f"{what} {middle:+.1%}: {verdict}")
    return "; ".join(said)


def overhead(rows: list[Row]) -> list[str]:
    lines = [
        "| sequences | tokens/s | step, ms | computing, ms | orchestrator | nats-server | journal at the ingress | "
        "together | target |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        verdict = "met" if row["together_share"] <= OVERHEAD_TARGET else "**missed**"
        shares = " | ".join(
            f"{row[key]:.2%}" for key in ("orchestrator_share", "nats_share", "journal_share", "together_share")
        )
        lines.append(
            f"| {row['sequences']:.0f} | {row['tokens_per_s']:.1f} | {row['step_ms']:.1f} | {row['compute_ms']:.1f} | "
            f"{shares} | <= {OVERHEAD_TARGET:.0%}: {verdict} |"
        )
    return lines

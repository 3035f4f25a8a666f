"""The gateway's tables of docs/benchmarks.md."""

from benchmarks.table import Row

TTFT_TARGET_MS, PACE_TARGET = 5.0, 0.98
PAINT_TARGET_MS, BYTES_TARGET = 1000.0, 300_000


def tables(result: Row) -> list[str]:
    """What HTTP costs beside the bus, many streams at once, and the dashboard; misses included."""
    single, page = result["rows"], result["page"]
    [beside] = [row for row in single if row["name"] == "HTTP beside the bus"]
    lines = [
        "| one at a time | first token ms | tokens/s |",
        "|---|---:|---:|",
        *(
            f"| {row['name']} | {row['ttft_ms']:.1f} | {row['tokens_per_s']:.1f} |"
            for row in single
            if row is not beside
        ),
        f"| {beside['name']} | {beside['ttft_ms']:+.1f} (target +5: {_met(beside['ttft_ms'] <= TTFT_TARGET_MS)}) | "
        f"{beside['tokens_per_s']:.1%} (target 98 %: {_met(beside['tokens_per_s'] >= PACE_TARGET)}) |",
        "",
        "| at once | errors | tokens/s | first token, 95 %, ms |",
        "|---|---:|---:|---:|",
        *(
            f"| {row['name']} | {row['errors']} | {row['tokens_per_s']:.0f} | {row['ttft_p95_ms']:.0f} |"
            for row in result["many"]
        ),
        "",
        f"The dashboard is {page['bytes'] / 1e3:.1f} KB in three files "
        f"(target 300: {_met(page['bytes'] <= BYTES_TARGET)})",
    ]
    if page["first_paint_ms"] is not None:
        painted = _met(page["first_paint_ms"] <= PAINT_TARGET_MS)
        lines[-1] += (
            f"; Chromium paints it first after {page['first_paint_ms']:.0f} ms (target 1,000: {painted}), and has "
            f"drawn the cluster after {page['drawn_ms']:.0f}."
        )
    return lines


def _met(is_met: bool) -> str:
    return "met" if is_met else "**missed**"

"""What moves while sequences run, and what they keep: re-splits, hand-over, conversations."""

import statistics

from benchmarks.pages.wording import ms
from benchmarks.table import Row

CHAT_TARGET = 1.25
"""Long histories over short ones: the length must not show above what runs vary by."""
LINK_MBIT_PER_S = 10
"""A slow link, for which hand-over is reckoned beside the one that was measured."""


def resplit(rows: list[Row]) -> list[str]:
    lines = [
        "| change | files | sequences | blocks moved | to commit, s | to last crossed, s | worst gap, ms: loading | "
        "crossing | after | target | held, ms: median | worst | MB moved | of used KV | failed | same tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        if "kind" not in row:
            lines.append(
                f"| {row['name']} | | {row['sequences']} | | | | {row['gap_worst_ms']:.0f}; median "
                f"{row['tpot_ms']:.0f} | | | | | | | | | |"
            )
            continue
        verdict = "met" if row["gap_worst_ms"] <= row["gap_target_ms"] else "**missed**"
        crossed = row["crossed"] > 0
        gaps = " | ".join(ms(row[key]) for key in ("gap_loading_ms", "gap_crossing_ms", "gap_after_ms"))
        held = f"{row['held_ms_median']:.0f} | {row['held_ms_worst']:.0f}" if crossed else "- | -"
        share = f"{row['moved_over_used']:.0%}" if row["moved_over_used"] is not None else "-"
        seen = row.get("identical")  # an interrupted run did not see it
        same = "-" if seen is None else "yes" if seen else "**no**"
        lines.append(
            f"| {row['name']} | {row['kind']} | {row['sequences']} | {row['blocks_moved']} | "
            f"{row['to_commit_s']:.2f} | {row['to_crossed_s']:.2f} | {gaps} | "
            f"<= {row['gap_target_ms']:.0f}: {verdict} | {held} | "
            f"{row['moved_mb']:.1f} | {share} | {row.get('failed', '-')} | {same} |"
        )
    return [*lines, "", *_resplit_memory(rows)]


def _resplit_memory(rows: list[Row]) -> list[str]:
    lines = [
        "| private memory of the agent that grows most, MB | sequences | weights that arrive | at most, over before | "
        "settled, over before |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "memory_peak_mb" in row:
            lines.append(
                f"| {row['name']}, {row['kind']} | {row['sequences']} | {row['arriving_mb']:.0f} | "
                f"{row['memory_peak_mb']:.0f} | {row['memory_settled_mb']:.0f} |"
            )
    return lines


def handover(rows: list[Row]) -> list[str]:
    lines = [
        "| prompt | tokens out | MB moved | of used KV | crossing, s | held, ms | anew, s | anew / crossing | "
        f"crossover, Mbit/s | crossing at {LINK_MBIT_PER_S} Mbit/s, s (reckoned) | sooner done there |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        slow_s = row["crossing_s"] + 8 * row["moved_mb"] / LINK_MBIT_PER_S
        sooner = "anew" if row["anew_s"] < slow_s else "hand-over"
        lines.append(
            f"| {row['prompt']} | {row['anew_tokens_out']:.0f} | {row['moved_mb']:.1f} | "
            f"{row['moved_over_used']:.0%} | {row['crossing_s']:.2f} | {row['held_ms']:.0f} | {row['anew_s']:.2f} | "
            f"{row['anew_over_crossing']:.1f} | {row['crossover_mbit_per_s']:.1f} | {slow_s:.1f} | {sooner} |"
        )
    return lines


def chat(rows: list[Row]) -> list[str]:
    lines = [
        "| turn | prompt, tokens | of these cached | TTFT, s | with nothing kept, s | same answer |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        same = ("yes" if row["identical"] else "**no**") if "identical" in row else ""
        anew = f"{row['anew_ttft_s']:.2f}" if "anew_ttft_s" in row else ""
        turn = row["name"].removeprefix("turn ")
        lines.append(f"| {turn} | {row['prompt']} | {row['cached_tokens']} | {row['ttft_s']:.2f} | {anew} | {same} |")
    kept = [row["ttft_s"] for row in rows if row["cached_tokens"]]
    half = len(kept) // 2
    ratio = statistics.median(kept[half:]) / statistics.median(kept[:half])
    verdict = "met" if ratio <= CHAT_TARGET else "**missed**"
    later = f"The later half of the turns with something kept over the earlier half, medians: {ratio:.2f}"
    return [*lines, "", f"{later} (target <= {CHAT_TARGET}: {verdict})."]

"""Split against whole."""

from benchmarks.pages.wording import against
from benchmarks.table import Row

TARGETS = {1: 0.95, 8: 0.90, 32: 0.95}
TTFT_TARGET = 1.15
MEMORY_TARGET_MB = 120


def tables(rows: list[Row]) -> list[str]:
    return [*decode(rows), "", *_ttft(rows), "", *_pinned(rows), "", *_where(rows), "", *_memory(rows)]


def decode(rows: list[Row]) -> list[str]:
    lines = [
        "| tokens/s | sequences | whole | onnxruntime-genai | split | split / whole | target |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if not row["name"].startswith("same cores") or "split_over_whole" not in row:
            continue
        genai = f"{row['genai_tokens_per_s']:.1f}" if "genai_tokens_per_s" in row else "-"
        how = "" if "genai_tokens_per_s" in row else ", `batch_invariant` off"
        lines.append(
            f"| {row['stages']} agents{how} | {row['sequences']} | {row['whole_tokens_per_s']:.1f} | {genai} | "
            f"{row['split_tokens_per_s']:.1f} | {against(row['split_over_whole'], TARGETS[row['sequences']])} |"
        )
    return lines


def _ttft(rows: list[Row]) -> list[str]:
    lines = [
        "| TTFT, 512 tokens | whole, s | onnxruntime-genai, s | split, s | split / whole | target |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "ttft_over_whole" in row:
            ratio = row["ttft_over_whole"]
            verdict = "met" if ratio <= TTFT_TARGET else "**missed**"
            lines.append(
                f"| {row['stages']} agents | {row['whole_ttft_s']:.2f} | {row['genai_ttft_s']:.2f} | "
                f"{row['split_ttft_s']:.2f} | {ratio:.2f} | <= {TTFT_TARGET}: {verdict} |"
            )
    return lines


def _pinned(rows: list[Row]) -> list[str]:
    lines = [
        "| one pinned core per agent, tokens/s | sequences | whole, both cores | split | / whole | / whole, one core |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "split_over_one_core" in row:
            lines.append(
                f"| {row['stages']} agents | {row['sequences']} | {row['whole_tokens_per_s']:.1f} | "
                f"{row['split_tokens_per_s']:.1f} | {row['split_over_whole']:.2f} | {row['split_over_one_core']:.2f} |"
            )
    return lines


def _where(rows: list[Row]) -> list[str]:
    lines = [
        "| where a token's time goes, ms | sequences | compute | waiting for the compute thread | under way |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "network_ms" in row:
            lines.append(
                f"| {row['stages']} agents | {row['sequences']} | {row['compute_ms']:.2f} | {row['queue_ms']:.2f} | "
                f"{row['network_ms']:.2f} |"
            )
    return lines


def _memory(rows: list[Row]) -> list[str]:
    lines = [
        "| private memory, MB | whole | split, all agents | over whole, per agent | target |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "over_whole_mb_per_agent" in row:
            more = row["over_whole_mb_per_agent"]
            verdict = "met" if more <= MEMORY_TARGET_MB else "**missed**"
            lines.append(
                f"| {row['stages']} agents | {row['whole_mb']:.0f} | {row['split_mb']:.0f} | {more:.0f} | "
                f"<= {MEMORY_TARGET_MB}: {verdict} |"
            )
    return lines

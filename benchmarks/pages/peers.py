"""The tables of docs/benchmarks.md in which others stand beside Resplit."""

from collections.abc import Iterable
from itertools import groupby

from benchmarks.table import Row

FAULTS = "faults"


def tables(result: Row) -> list[str]:
    """Each precision, what was aimed at, whether tokens are the same, and faults; whoever was skipped included."""
    rows = result["rows"]
    measured = [row for row in rows if "tokens_per_s" in row]
    return [
        _others(result["peers"]),
        "",
        *_speed(measured),
        "",
        *_targets([row for row in rows if "target" in row]),
        *_same([row for row in measured if row.get("same_tokens")]),
        "",
        *_faults([row for row in rows if "outcomes" in row]),
        "",
        *_slow([row for row in rows if "before_tokens_per_s" in row]),
        *_skipped([row for row in rows if "skipped" in row]),
        "",
        *(_when(part, told) for part, told in result["parts"].items()),
    ]


def _others(peers: Row) -> str:
    """What they are."""
    told = []
    for name, peer in peers.items():
        options = f", built by {peer['compiler']} with `{peer['options']}`" if "options" in peer else ""
        told.append(f"{name}: {peer['missing']}" if "missing" in peer else f"{name}: {peer['version']}{options}")
    return ". ".join(told) + "."


def _speed(rows: list[Row]) -> list[str]:
    lines = [
        "| weights | who | rounds | tokens/s | / whole | interval | TTFT, s | / whole | processor, ms a token | "
        "MB, computing | MB, all |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratios = ("-", "-", "-")
        if "over_whole" in row:
            interval = f"{row['over_whole_low']:.2f} to {row['over_whole_high']:.2f}"
            ratios = (f"{row['over_whole']:.2f}", interval, f"{row['ttft_over_whole']:.2f}")
        lines.append(
            f"| {row['part']} | {row['name']} | {row['rounds']} | {row['tokens_per_s']:.1f} | {ratios[0]} | "
            f"{ratios[1]} | {row['ttft_s']:.2f} | {ratios[2]} | {row['cpu_ms']:.0f} | {row['stages_mb']:,} | "
            f"{row['memory_mb']:,} |"
        )
    return lines


def _targets(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["| aimed at | weights | Resplit | llama.cpp RPC, the better way | |", "|---|---|---:|---:|---|"]
    for row in rows:
        verdict = "met" if row["met"] else "**missed**"
        lines.append(f"| {row['target']} | {row['part']} | {row['ours']:.2f} | {row['theirs']:.2f} | {verdict} |")
    return [*lines, ""]


def _same(rows: list[Row]) -> list[str]:
    """How many greedy tokens are those of ONNX Runtime's session, answer by answer."""
    lines = []
    for part, of_part in groupby(rows, key=lambda row: str(row["part"])):
        for tokens, alike in groupby(
            sorted(of_part, key=_agreement, reverse=True), key=lambda row: (_agreement(row), row["of_tokens"])
        ):
            found = list(alike)
            parted = [row["parted"] for row in found if "parted" in row]
            why = ""
            if parted:
                nearest = max(one["margin"] / one["spread"] for one in parted)
                why = f"; where they part, the two tokens are at most {nearest:.1%} of the logits' spread apart"
            names = ", ".join(row["name"] for row in found)
            lines.append(f"- {part}, the first {tokens[0]} of {tokens[1]} tokens of an answer at least: {names}{why}")
    return ["The same greedy tokens as ONNX Runtime's session:", "", *lines]


def _agreement(row: Row) -> int:
    return int(min(row["same_tokens"]))


def _faults(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| the last stage's process | who | the answer | heard of it, s | tokens again, s | what had to be done |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: str(row["fault"]), reverse=True):
        outcomes = "; ".join(_counted(_brief(outcome) for outcome in row["outcomes"]))
        done = "; ".join(_counted(row["mended_by"]))
        times = [", ".join(f"{value:.1f}" for value in row[key]) for key in ("heard_s", "answers_s")]
        lines.append(f"| {row['fault']} | {row['name']} | {outcomes} | {times[0]} | {times[1]} | {done} |")
    return lines


def _counted(words: Iterable[str]) -> list[str]:
    found = list(words)
    return [word if len(set(found)) == 1 else f"{word} ({found.count(word)})" for word in dict.fromkeys(found)]


def _brief(outcome: str) -> str:
    """The kind of an error, without what differs from run to run."""
    kind, colon, _ = outcome.partition(": ")
    return f"`{kind}`" if colon else outcome


def _slow(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| the last stage gets a third of its time, tokens/s | before | at first | after 20 s | of before | "
        "longest wait, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        kept = f"{row['recovered']:.0%}" if row["recovered"] is not None else "-"
        wait = f"{row['longest_wait_s']:.2f}" if row["longest_wait_s"] is not None else "-"
        lines.append(
            f"| {row['name']} | {row['before_tokens_per_s']:.1f} | {row['slowed_tokens_per_s']:.1f} | "
            f"{row['at_end_tokens_per_s']:.1f} | {kept} | {wait} |"
        )
    return lines


def _skipped(rows: list[Row]) -> list[str]:
    return ["", *(f"- {row['part']}, {row['name']}: took no part, {row['skipped']}" for row in rows)] if rows else []


def _when(part: str, told: Row) -> str:
    before, after = (", ".join(f"{one:.1f}" for one in told[key]) for key in ("load_average_before", "load_average"))
    return f"- {part}: {told['at']}, in {told['took_s']} s; load average {before} before and {after} after"

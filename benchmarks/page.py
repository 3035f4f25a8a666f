"""Tables of docs/benchmarks.md, docs/reliability.md and the README, from the results: `python -m benchmarks.page`."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks import gateway_page, load_page, peers_page, residency_page, scenarios_page, services_page
from benchmarks.sealing import FOR_A_TOKEN
from benchmarks.soak import page as soak_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = {1: 0.95, 8: 0.90, 32: 0.95}
TTFT_TARGET = 1.15
MEMORY_TARGET_MB = 120
SEALING_TARGET = 0.03
"""How much longer a token may take where its request is sealed."""
OVERHEAD_TARGET = 0.02
CHAT_TARGET = 1.25
"""Long histories over short ones: the length must not show above what runs vary by."""
LINK_MBIT_PER_S = 10
"""A slow link, for which hand-over is reckoned beside the one that was measured."""

Row = dict[str, Any]


def main() -> None:
    split = json.loads((RESULTS / "split.json").read_text())
    page = ROOT / "docs" / "benchmarks.md"
    page.write_text(_between(page.read_text(), "split", [_hardware(split), "", *_tables(split["rows"])]))
    planning = json.loads((RESULTS / "planning.json").read_text())
    page.write_text(_between(page.read_text(), "planning", planning_table(planning)))
    for name, table in (
        ("resplit", _resplit),
        ("sealed", _sealed),
        ("handover", _handover),
        ("chat", _chat),
        ("overhead", _overhead),
        ("sealing", _sealing),
        ("prediction", _prediction),
        ("shortlist", _shortlist),
        ("validation", _validation),
        ("worlds", _worlds),
        ("disks", residency_page.placed),
        ("residency", residency_page.traces),
        ("ahead", residency_page.ahead),
        ("lora", residency_page.variants),
    ):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        page.write_text(_between(page.read_text(), name, [_under(result), "", *table(result["rows"])]))
    gateway = json.loads((RESULTS / "gateway.json").read_text())
    page.write_text(_between(page.read_text(), "gateway", [_under(gateway), "", *gateway_page.tables(gateway)]))
    for name, told in (("overload", load_page.overload), ("control_plane", load_page.control_plane)):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        page.write_text(_between(page.read_text(), name, [_under(result), "", *told(result)]))
    peers = json.loads((RESULTS / "peers.json").read_text())
    page.write_text(_between(page.read_text(), "peers", [_under(peers), "", *peers_page.tables(peers)]))
    compared = scenarios_page.lines_of(RESULTS / "scenarios")
    page.write_text(_between(page.read_text(), "scenarios", compared))
    services = json.loads((RESULTS / "services.json").read_text())
    placed = [*services_page.speed(services["rows"]), "", *services_page.predicted(services["predicted"])]
    page.write_text(_between(page.read_text(), "services", [_under(services), "", *placed]))
    for kind, folder in (("two-tier", "two-tier"), ("many-models", "residency")):
        page.write_text(_between(page.read_text(), kind, services_page.compared(RESULTS / folder)))
    faults = json.loads((RESULTS / "faults.json").read_text())
    reliability = ROOT / "docs" / "reliability.md"
    reliability.write_text(_between(reliability.read_text(), "faults", faults_table(faults)))
    soak = json.loads((RESULTS / "soak.json").read_text())
    reliability.write_text(_between(reliability.read_text(), "soak", [_under(soak), "", *soak_page.table(soak)]))
    readme = ROOT / "README.md"
    readme.write_text(_between(readme.read_text(), "bench", [_hardware(split), "", *_decode(split["rows"])]))


def _between(text: str, name: str, lines: list[str]) -> str:
    """The text with what stands between the markers of `name` replaced."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert marked.search(text), f"no marker {name!r}"
    return marked.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text)


def planning_table(result: Row) -> list[str]:
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


def faults_table(result: Row) -> list[str]:
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


def _hardware(result: Row) -> str:
    hardware, versions = result["hardware"], result["versions"]
    simd = ", ".join(hardware["simd"]) or "no SIMD listed"
    return (
        f"{result['title']}; {hardware['cores']} cores of {hardware['cpu']} ({simd}), "
        f"{hardware['memory_bytes'] / 2**30:.0f} GiB; ONNX Runtime {versions['onnxruntime-gpu']}; medians of "
        f"{result['rounds']} rounds; `{result['command']}`, {result['at'][:10]}. {result.get('note', '')}"
    ).strip()


def _under(result: Row) -> str:
    """Where and under which load a result was measured."""
    hardware, load = result["hardware"], ", ".join(f"{load:.1f}" for load in result["load_average"])
    return (
        f"{result['title']}; {hardware['cores']} cores of {hardware['cpu']}; load average {load} at the end; "
        f"`{result['command']}`, {result['at'][:10]}. {result.get('note', '')}"
    ).strip()


def _resplit(rows: list[Row]) -> list[str]:
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
        gaps = " | ".join(_ms(row[key]) for key in ("gap_loading_ms", "gap_crossing_ms", "gap_after_ms"))
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


def _handover(rows: list[Row]) -> list[str]:
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


def _sealed(rows: list[Row]) -> list[str]:
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


def _chat(rows: list[Row]) -> list[str]:
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


def _overhead(rows: list[Row]) -> list[str]:
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


def _sealing(rows: list[Row]) -> list[str]:
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


def _prediction(rows: list[Row]) -> list[str]:
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


def _validation(rows: list[Row]) -> list[str]:
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


def _shortlist(rows: list[Row]) -> list[str]:
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


def _worlds(rows: list[Row]) -> list[str]:
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


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _tables(rows: list[Row]) -> list[str]:
    return [*_decode(rows), "", *_ttft(rows), "", *_pinned(rows), "", *_where(rows), "", *_memory(rows)]


def _decode(rows: list[Row]) -> list[str]:
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
            f"{row['split_tokens_per_s']:.1f} | {_against(row['split_over_whole'], TARGETS[row['sequences']])} |"
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


def _against(ratio: float, target: float) -> str:
    verdict = "met" if ratio >= target else "**missed**"
    return f"{ratio:.2f} | >= {target}: {verdict}"


if __name__ == "__main__":
    main()

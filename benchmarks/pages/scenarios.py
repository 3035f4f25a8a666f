"""Tables of simulated comparisons, from `results/scenarios`, as lines of docs/benchmarks.md."""

import json
from pathlib import Path

from benchmarks.table import Row

CHI_MIN = 3.0
"""From here on adapting is to beat the static optimum."""
UNPERTURBED_POINTS = 2.0
"""Where nothing changes, at most so many of a hundred requests are to fare worse than under the static optimum."""
PHI_RATIO_MAX = 1.5
"""Of the clairvoyant's Phi."""
SHORTCOMINGS_SHOWN = 12


def lines_of(folder: Path) -> list[str]:
    """A table of what the system is held to, then each comparison with its own tables."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = [
        "| scenario | seeds | QoS %, static | full | difference | held to | verdict | difference from static-start "
        "| Phi over the clairvoyant's | held to | verdict | violations |",
        "|---|---:|---:|---:|---:|---|---|---:|---:|---|---|---:|",
    ]
    lines += [_held(result, row) for result in results for row in result["rows"]]
    for result in results:
        lines += ["", *_comparison(result)]
    return lines


def _held(result: Row, row: Row) -> str:
    found, name = row["figures"], result["benchmark"].removeprefix("scenarios/")
    where = ", ".join(f"{key} = {value:g}" for key, value in row["point"].items())
    gain, ratio = found["qos_gain"], found["phi_over_clairvoyant"]
    target, verdict = "-", "-"
    if gain is not None and name == "unperturbed":
        target = f">= -{UNPERTURBED_POINTS:g}"
        verdict = _verdict(gain[1] >= -UNPERTURBED_POINTS, gain[2] >= -UNPERTURBED_POINTS)
    elif gain is not None and row["point"].get("chi", CHI_MIN) >= CHI_MIN:
        target, verdict = "> 0", _verdict(gain[1] > 0, gain[2] > 0)
    within = "-" if ratio is None else _verdict(ratio[2] <= PHI_RATIO_MAX, ratio[1] <= PHI_RATIO_MAX)
    cells = [
        f"{name}, {where}" if where else name,
        result["seeds"],
        _shown(found["qos_static"]),
        _shown(found["qos"]),
        _shown(gain, signed=True),
        target,
        verdict,
        _shown(found.get("qos_gain_start"), signed=True),
        _shown(ratio, digits=2),
        f"<= {PHI_RATIO_MAX:g}",
        within,
        str(found["violations"]),
    ]
    return f"| {' | '.join(cells)} |"


def _verdict(surely: bool, perhaps: bool) -> str:
    return "met" if surely else "not shown" if perhaps else "**missed**"


def _shown(found: list[float] | None, signed: bool = False, digits: int = 1) -> str:
    if found is None:
        return "-"
    sign = "+" if signed else ""
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in found)
    return f"{mean} [{low}, {high}]"


def _comparison(result: Row) -> list[str]:
    name = result["benchmark"].removeprefix("scenarios/")
    other = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in result["other"].items())
    told = (
        f"`python -m benchmarks.scenarios {name} --seeds {result['seeds']}`, {result['at'][:10]}; "
        f"{result['requests']:,} requests, "
        f"{result['events']:,} events, {result['core_s'] / 60:.0f} min of one core of {result['hardware']['cpu']}"
    )
    lines = [f"### {result['title']}", "", f"{told}. Other than in the scenario: {other or 'nothing'}."]
    for row in result["rows"]:
        point = ", ".join(f"{key} = {value:g}" for key, value in row["point"].items())
        for grid in ("served", "spent", "optimality", "paper"):
            title = row[grid]["title"]
            lines += ["", f"**{title}{f', {point}' if point else ''}**", "", *row[grid]["lines"]]
    said = result["shortcomings"]
    if said:
        more = len(said) - SHORTCOMINGS_SHOWN
        lines += ["", "What speaks against it:", "", *(f"- {each}" for each in said[:SHORTCOMINGS_SHOWN])]
        lines += [f"- and {more} more, which the files beside the results tell"] if more > 0 else []
    return lines

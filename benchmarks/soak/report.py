"""What a soak showed, as rows with their bounds and verdicts. Functions of values."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.soak.samples import Points
from benchmarks.soak.soak import Told
from benchmarks.soak.verdict import Request, account, grows, left_over, lost, stuck, trend, windows
from benchmarks.table import Row

STUCK_S = 30.0
"""A request ends within this, counted from where the last fault that it met was over: those of 200 tokens on a busy
machine take ten seconds."""
WARM_S = 90.0
"""A process that began no longer ago still fills caches and pools: it grows, and nothing leaks."""
SHARE, BYTES = 0.05, 8 << 20
"""What memory may grow by in an hour: this share of itself, or these bytes where that is more."""
PIECES = 6.0
"""What files and threads may grow by in an hour."""
SLACK = {"files": 6.0, "subscriptions": 3.0, "connections": 0.0}
"""What there may be more of in the end: links and subscriptions are where the plans are."""
UNITS = {"pss_bytes": ("memory", "MiB", 2**20), "files": ("open files", "", 1), "threads": ("threads", "", 1)}
ROLE = re.compile(r"^(n)?(.*?)(-?\d+)?$")


def role(name: str) -> str:
    """Agents `n0`, `n1` are alike, and so are orchestrators."""
    found = ROLE.match(name)
    assert found is not None
    return "agents" if found[1] and not found[2] else f"{found[2]}s" if found[2] == "orchestrator" else name


def rows(told: Told) -> list[Row]:
    """The table: what may not grow, what may not be left, what may not hang, what must be accounted for."""
    return [*_growth(told), *_left(told), *_requests(told)]


def _growth(told: Told) -> Iterator[Row]:
    for figure, (what, unit, scale) in UNITS.items():
        by_role: dict[str, dict[str, Points]] = defaultdict(dict)
        for name, of_lives in told.samples.processes.get(figure, {}).items():
            for life, points in of_lives.items():
                by_role[role(name)][life] = windows(_warm(points), told.quiet)
        for name, series in sorted(by_role.items()):
            found = trend(series)
            bound = PIECES if figure != "pss_bytes" else max(BYTES, SHARE * found.baseline) if found else BYTES
            row: Row = {"name": f"{what} of {name}", "unit": unit, "bound": f"<= {bound / scale:.3g} an hour"}
            if found is not None:
                row |= {
                    "windows": found.points,
                    "lives": found.lives,
                    "baseline": round(found.baseline / scale, 1),
                    "per_hour": round(found.per_hour / scale, 2),
                    "low": round(found.low / scale, 2),
                    "high": round(found.high / scale, 2),
                }
            yield {**row, "verdict": grows(found, bound)}


def _warm(points: Points) -> Points:
    return [(at, value) for at, value in points if at >= points[0][0] + WARM_S]


def _left(told: Told) -> Iterator[Row]:
    for name in ("sequences", "requests that wait", "epochs that no plan names", "consumers"):
        left = told.after.get(name, 0.0)
        yield _none(f"{name}, in the end", left, "in use, at most" if name == "sequences" else "", _most(told, name))
    yield _none("requests owed in the journal, in the end", sum(told.owed.values()), "fences kept", told.fences)
    for kind, slack in SLACK.items():
        counted = {name: value for name, value in told.after.items() if name.startswith(kind)}
        more = left_over(told.before, counted, slack)
        row = _none(f"{kind} more than before", sum(more.values()), f"bound {slack:g} each; in the end", None)
        yield {**row, "most": sum(counted.values()), "left": more}
    for name in sorted(name for name in told.after if name.endswith(" bytes")):
        yield {
            "name": name.replace(" bytes", ", MiB"),
            "bound": "none",
            "value": round(told.after[name] / 2**20, 2),
            "verdict": "",
        }


def _most(told: Told, name: str) -> float:
    return max((value for _, value in told.samples.cluster.get(name, ())), default=0.0)


def _requests(told: Told) -> Iterator[Row]:
    found = account(told.requests, told.accepted, told.ends)
    hung = stuck(told.requests, told.faults, STUCK_S, told.ended)
    gone = lost(told.requests, told.accepted)
    yield {**_none("requests lost or answered wrongly", len(gone), "requests", len(told.requests)), "which": gone[:20]}
    yield _none("tokens said twice with different values", len(told.conflicts), "", None)
    yield {**_none(f"requests that took {STUCK_S:g} s with nothing broken", len(hung), "", None), "which": hung[:20]}
    missing = _none("accepted requests whose end is not in the trail", len(found.missing), "accepted", found.accepted)
    yield {**missing, "which": list(found.missing[:20])}
    yield _none(
        "answers that the trail has as errors alone", len(found.contradicted), "ends told again", found.repeated
    )
    yield {
        **_none("`resplit audit verify`: exit status", told.verified, "events", told.events),
        "said": told.verdict,
    }
    yield {**_none("promises of the faults broken", len(told.broken), "faults", len(told.faults)), "which": told.broken}


def _none(name: str, value: float | None, beside: str, count: float | None) -> Row:
    verdict = "met" if value == 0 else "**missed**"
    more = {"beside": beside, "most": count} if beside or count is not None else {}
    return {"name": name, "bound": "0", "value": value, **more, "verdict": verdict.strip("*")}


def kinds(requests: Sequence[Request]) -> dict[str, dict[str, int]]:
    """How many requests of each kind ended how."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for one in requests:
        found[one.kind][one.outcome] += 1
    return {kind: dict(sorted(outcomes.items())) for kind, outcomes in sorted(found.items())}


def done(told: Told) -> Mapping[str, int]:
    """How often each fault was done."""
    return dict(sorted(Counter(fault.name for fault in told.faults).items()))

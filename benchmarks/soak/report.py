"""What a soak showed, as rows with their bounds and verdicts. Functions of values."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.faults.surroundings import AGENTS
from benchmarks.soak.samples import Points
from benchmarks.soak.soak import Told
from benchmarks.soak.verdict import Request, account, grows, left_over, lost, stuck, trend, windows
from benchmarks.table import Row
from orchestrator.inbox import FETCH_S, FORGET_CONSUMER_S, SILENT_FETCHES_MAX

STUCK_S = 30.0
"""A request ends within this, counted from where the last fault that it met was over: those of 200 tokens on a busy
machine take ten seconds."""
WARM_S = 240.0
"""A process that began no longer ago still fills caches and pools: it grows, and nothing leaks."""
SPAN_S = 900.0
"""A slope an hour is said where some life was looked at for so long."""
SHARE, BYTES = 0.05, 8 << 20
"""What memory may grow by in an hour: this share of itself, or these bytes where that is more."""
PIECES = 6.0
"""What files and threads may grow by in an hour."""
DEPLOYMENTS = 2
LINKS = 2 * AGENTS
LEFT = {
    "files": (LINKS, "links are where the plans are"),
    "subscriptions": (AGENTS * DEPLOYMENTS, "one for the journal of each agent that ever was an ingress"),
    "connections": (0, ""),
    "consumers": (
        round(FORGET_CONSUMER_S / (SILENT_FETCHES_MAX * FETCH_S)),
        "the leader takes another where receipts are silent, and the server forgets the one before a minute later",
    ),
}
"""What there may be more of in the end than there was before, and why."""
SCALES = {"pss_bytes": ("memory", "MiB", 2**20), "files": ("open files", "", 1), "threads": ("threads", "", 1)}
SHOWN = 20


def role(name: str) -> str:
    """Agents `n0`, `n1` are alike, and so are orchestrators."""
    plain = re.sub(r"-?\d+$", "", name)
    return {"n": "agents", "orchestrator": "orchestrators"}.get(plain, plain)


def rows(told: Told) -> list[Row]:
    """What may not be lost, hang or go unaccounted, what may not be left, what may not grow."""
    return [*_requests(told), *_left(told), *_growth(told)]


def _requests(told: Told) -> Iterator[Row]:
    found = account(told.requests, told.accepted, told.ends)
    hung = stuck(told.requests, told.faults, STUCK_S, told.ended)
    gone = lost(told.requests, told.accepted)
    yield _none("requests lost, or answered wrongly", gone, f"of {len(told.requests)}")
    yield _none("tokens said twice with different values", told.conflicts)
    yield _none(f"requests that took more than {STUCK_S:g} s with nothing broken", hung, f"of {len(told.requests)}")
    beside = f"of {found.accepted}; {found.repeated} ended twice there"
    yield _none("accepted requests without an end in the audit trail", found.missing, beside)
    yield _none("answers that the audit trail has as errors alone", found.contradicted)
    verified = [] if told.verified == 0 else [told.verdict]
    yield _none("faults that `resplit audit verify` finds", verified, told.verdict)
    yield _none("promises of the faults broken", told.broken, f"{len(told.faults)} faults")


def _left(told: Told) -> Iterator[Row]:
    for name in ("sequences", "requests that wait", "epochs that no plan names"):
        most = max((value for _, value in told.samples.cluster.get(name, ())), default=0.0)
        row: Row = {
            "name": f"{name}, in the end",
            "bound": "0",
            "value": told.after[name],
            "beside": f"at most {most:g}",
        }
        yield {**row, "verdict": _met(told.after[name] == 0)}
    owed = [f"{life}: {messages}" for life, messages in told.owed.items()]
    yield _none("messages of the journal, in the end", owed, f"{told.fences} fences are kept")
    for kind, (slack, why) in LEFT.items():
        more = left_over(told.before, {name: held for name, held in told.after.items() if name.startswith(kind)})
        most = max(more.values(), default=0.0)
        bound = f"<= {slack:g} more" + (f": {why}" if why else "")
        yield {"name": kind, "bound": bound, "value": most, "which": more, "verdict": _met(most <= slack)}
    for name in sorted(name for name in told.after if name.endswith(" bytes")):
        size = round(told.after[name] / 2**20, 2)
        yield {"name": name.replace(" bytes", ", MiB"), "bound": "none", "value": size, "verdict": ""}


def _growth(told: Told) -> Iterator[Row]:
    for figure, (what, unit, scale) in SCALES.items():
        by_role: dict[str, dict[str, Points]] = defaultdict(dict)
        for name, of_lives in told.samples.processes.get(figure, {}).items():
            for life, points in of_lives.items():
                by_role[role(name)][life] = windows(_warm(points), told.quiet)
        for name, series in sorted(by_role.items()):
            spans = [points[-1][0] - points[0][0] for points in series.values() if points]
            found = trend(series) if max(spans, default=0.0) >= SPAN_S else None
            bound = PIECES if figure != "pss_bytes" else max(BYTES, SHARE * found.baseline) if found else BYTES
            row: Row = {"name": f"{what} of {name}", "bound": f"<= {bound / scale:.3g} {unit} more an hour"}
            if found is not None:
                row |= {
                    "value": round(found.per_hour / scale, 2),
                    "low": round(found.low / scale, 2),
                    "high": round(found.high / scale, 2),
                    "beside": f"of {found.baseline / scale:.3g}; {found.points} windows of {found.lives} lives",
                }
            yield {**row, "verdict": grows(found, bound)}


def _warm(points: Points) -> Points:
    return [(at, value) for at, value in points if at >= points[0][0] + WARM_S]


def _none(name: str, which: Sequence[str], beside: str = "") -> Row:
    """There is to be nothing of this."""
    shown = {"which": list(which[:SHOWN])} if which else {}
    return {"name": name, "bound": "0", "value": len(which), "beside": beside, **shown, "verdict": _met(not which)}


def _met(held: bool) -> str:
    return "met" if held else "missed"


def kinds(requests: Sequence[Request]) -> dict[str, dict[str, int]]:
    """How many requests of each kind ended how."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for one in requests:
        found[one.kind][one.outcome] += 1
    return {kind: dict(sorted(outcomes.items())) for kind, outcomes in sorted(found.items())}


def done(told: Told) -> Mapping[str, int]:
    """How often each fault was done."""
    return dict(sorted(Counter(fault.name for fault in told.faults).items()))

"""PURE: who asks for what, and when, drawn from a scenario before anything runs in it: the same for every policy.

Every process is drawn on the scale of requests expected so far, where its rate is 1, and bent to time from there: a
ramp makes Poisson arrivals, ticks and the rows of a trace alike come faster.
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from schemas.errors import ErrorCode, ResplitError
from simulator.draws import Draws
from simulator.records import Arrival
from simulator.scenario import Ramp, Scenario, Workload
from simulator.traces import TraceRow

ARRIVALS_MAX = 2_000_000
"""They are drawn before the run and kept; a million takes some hundred megabytes."""
GRID_POINTS = 50_000
"""Between which the rate counts as constant: 72 ms apart in a run of an hour."""
CHANGES_MAX = 100_000
"""Of the place or the pace of a run: shorter bursts than these are no bursts."""

Floats = NDArray[np.float64]


def arrivals(scenario: Scenario, draws: Draws, trace: Sequence[TraceRow] | None = None) -> tuple[Arrival, ...]:
    """The requests of a run in order of time, from `warmup_s` until `duration_s`.

    Lengths are log-normal with the means of the class, those of a trace its own; none is longer than the context
    served. Raises `ResplitError(INVALID_REQUEST)` if there would be more than `ARRIVALS_MAX`, and if the scenario
    needs a trace and there is none.
    """
    workload = scenario.workload
    if workload.process == "trace" and not trace:
        raise _refused(scenario, f"workload.trace: the rows of {workload.trace!r} are needed", "workload.trace")
    times, rows = _times(scenario, draws, trace or ())
    classes = _classes(workload, draws.stream("classes of requests"), len(times))
    lengths = _lengths(scenario, draws.stream("lengths of requests"), classes, rows)
    sites = _sites(scenario, draws, times)
    return tuple(
        Arrival(number, at_s, workload.classes[kind].name, site, prompt, output)
        for number, (at_s, kind, site, (prompt, output)) in enumerate(zip(times, classes, sites, lengths, strict=True))
    )


def trace_hash(found: Sequence[Arrival]) -> str:
    """SHA-256 of all arrivals, a line each; two runs with one hash were asked the same."""
    digest = sha256()
    for one in found:
        line = (one.number, round(one.at_s * 1e6), one.name, one.site, one.prompt_tokens, one.output_tokens)
        digest.update((" ".join(map(str, line)) + "\n").encode())
    return digest.hexdigest()


def _times(
    scenario: Scenario, draws: Draws, trace: Sequence[TraceRow]
) -> tuple[list[float], Sequence[TraceRow] | None]:
    """When requests arrive, and of a trace the row of each.

    In whole microseconds, so that machines whose mathematics differ in the last bit draw the same.
    """
    workload, begin_s, end_s = scenario.workload, scenario.warmup_s, scenario.duration_s
    rng = draws.stream("times of requests")
    edges = [(begin_s, 1.0)]
    if workload.process == "mmpp":
        edges = list(_bursts(scenario, draws.stream("bursts")))
    grid, expected = _expected(workload.ramps, edges, begin_s, end_s)
    # A trace counts in its own seconds, unless it is to be as fast as somebody says.
    rate = workload.rate_per_s or 1.0
    if workload.process != "trace":
        expected *= rate
        # Many steep ramps at once are more than a float holds, and so is their sum with one that stops everything.
        if not (total := expected[-1]) <= ARRIVALS_MAX:
            message = f"workload.rate_per_s = {rate:g} makes about {total:.3g} requests; {ARRIVALS_MAX} at most"
            raise _refused(scenario, message, "workload.rate_per_s")
    rows: Sequence[TraceRow] | None = None
    match workload.process:
        case "poisson" | "mmpp":
            counts = np.sort(rng.uniform(0, expected[-1], rng.poisson(expected[-1])))
        case "periodic":
            ticks = np.arange(int(expected[-1]) + 2) + rng.random()
            counts = np.sort(ticks + workload.jitter * rng.uniform(-1, 1, len(ticks)))
        case "trace":
            scale = 1.0
            if workload.rate_per_s is not None and trace[-1].at_s > 0:
                scale = (len(trace) - 1) / trace[-1].at_s / workload.rate_per_s
            counts = scale * np.array([row.at_s for row in trace])
            rows = trace[: int(np.searchsorted(counts, expected[-1]))]
            if len(rows) > ARRIVALS_MAX:
                raise _refused(
                    scenario, f"workload.trace: these are more than {ARRIVALS_MAX} requests", "workload.trace"
                )
    counts = counts[(counts >= 0) & (counts < expected[-1])]
    return [round(time, 6) for time in np.interp(counts, expected, grid).tolist()], rows


def _expected(
    ramps: Sequence[Ramp], edges: Sequence[tuple[float, float]], begin_s: float, end_s: float
) -> tuple[Floats, Floats]:
    """Points in time, and the integral up to each of a rate that is 1 but for ramps and bursts.

    `edges`: from when on the rate is multiplied by what, in order. Between two points the rate counts as that in the
    middle, which is exact in the integral for a single ramp.
    """
    corners = [corner for ramp in ramps for corner in _corners(ramp)]
    inner = [time for time in [*corners, *(at_s for at_s, _ in edges)] if begin_s < time < end_s]
    grid = np.unique(np.concatenate([np.linspace(begin_s, end_s, GRID_POINTS), np.array(inner)]))
    middle = (grid[1:] + grid[:-1]) / 2
    factors = np.array([factor for _, factor in edges])
    rate = factors[np.searchsorted([at_s for at_s, _ in edges], middle, side="right") - 1]
    with np.errstate(over="ignore", invalid="ignore"):
        for ramp in ramps:
            first, *_, last = _corners(ramp)
            part = slice(*np.searchsorted(middle, [first, last]))
            rate[part] *= np.interp(middle[part], _corners(ramp), [1, ramp.factor, ramp.factor, 1])
        return grid, np.concatenate([[0.0], np.cumsum(rate * np.diff(grid))])


def _corners(ramp: Ramp) -> tuple[float, float, float, float]:
    full_s = ramp.at_s + ramp.rise_s
    return ramp.at_s, full_s, full_s + ramp.stay_s, full_s + ramp.stay_s + ramp.rise_s


def _bursts(scenario: Scenario, rng: Generator) -> Iterator[tuple[float, float]]:
    """The two states of an MMPP from its stationary state on: from when on how many times the mean rate arrives."""
    workload = scenario.workload
    share = workload.burst_share
    calm_s = workload.burst_s * (1 - share) / share
    at_s, end_s = scenario.warmup_s, scenario.duration_s
    if (expected := 2 * (end_s - at_s) / (workload.burst_s + calm_s)) > CHANGES_MAX:
        message = f"workload.burst_s = {workload.burst_s:g} makes about {expected:.3g} changes; {CHANGES_MAX} at most"
        raise _refused(scenario, message, "workload.burst_s")
    calm = 1 / (1 - share + share * workload.burst_factor)
    burst = bool(rng.random() < share)
    while at_s < end_s:
        yield at_s, workload.burst_factor * calm if burst else calm
        at_s += rng.exponential(workload.burst_s if burst else calm_s)
        burst = not burst


def _classes(workload: Workload, rng: Generator, count: int) -> list[int]:
    """The class of each request, by share."""
    shares = np.array([kind.share for kind in workload.classes])
    picked: list[int] = rng.choice(len(shares), size=count, p=shares / shares.sum()).tolist()
    return picked


def _lengths(
    scenario: Scenario, rng: Generator, classes: Sequence[int], rows: Sequence[TraceRow] | None
) -> list[tuple[int, int]]:
    """Prompt and output of each request."""
    context = scenario.served.settings.context_tokens
    if rows is not None:
        return [_fitting(row.prompt_tokens, row.output_tokens, context) for row in rows]
    kinds = scenario.workload.classes
    spread = np.array([kind.spread for kind in kinds])[classes]
    # The mean of a log-normal is exp(mu + s^2/2).
    drawn = np.exp(spread[:, None] * rng.standard_normal((len(classes), 2)) - spread[:, None] ** 2 / 2)
    means = np.array([(kind.prompt_tokens, kind.output_tokens) for kind in kinds])[classes]
    whole = np.rint(means * drawn).astype(int).tolist()
    return [_fitting(prompt, output, context) for prompt, output in whole]


def _fitting(prompt: int, output: int, context: int) -> tuple[int, int]:
    """At least a token of each, and together no more than the context: the output has what the prompt leaves and at
    least half, the prompt has the rest."""
    prompt, output = max(prompt, 1), max(output, 1)
    output = min(output, max(context - prompt, context // 2))
    return min(prompt, context - output), output


def _sites(scenario: Scenario, draws: Draws, times: Sequence[float]) -> list[str]:
    """Where each request arrives: anywhere, a site with more nodes having more clients; or where everybody is now."""
    sites = [site for site in scenario.sites if site.clients]
    if scenario.workload.moves_s is None:
        weights = np.array([site.nodes for site in sites], dtype=float)
        rng = draws.stream("sites of requests")
        picked = rng.choice(len(sites), size=len(times), p=weights / weights.sum()).tolist()
        return [sites[position].name for position in picked]
    way = list(_way(scenario, len(sites), draws.stream("moves")))
    moments = np.searchsorted([at_s for at_s, _ in way], times, side="right") - 1
    return [sites[way[moment][1]].name for moment in moments.tolist()]


def _way(scenario: Scenario, count: int, rng: Generator) -> Iterator[tuple[float, int]]:
    """From when on the source is at which of `count` sites: to and fro along them in the order of the file, as a
    vehicle along a corridor."""
    assert scenario.workload.moves_s is not None
    shortest_s, longest_s = scenario.workload.moves_s
    if (expected := 2 * (scenario.duration_s - scenario.warmup_s) / (shortest_s + longest_s)) > CHANGES_MAX:
        message = f"workload.moves_s makes about {expected:.3g} moves; {CHANGES_MAX} at most"
        raise _refused(scenario, message, "workload.moves_s")
    at_s, place, step = scenario.warmup_s, int(rng.integers(count)), 1
    while at_s < scenario.duration_s:
        yield at_s, place
        at_s += rng.uniform(shortest_s, longest_s)
        if not 0 <= place + step < count:
            step = -step
        place = min(max(place + step, 0), count - 1)


def _refused(scenario: Scenario, message: str, key: str) -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, f"scenario {scenario.name!r}: {message}", key)

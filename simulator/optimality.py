"""PURE: how far policies are from what could have been: their Phi over that of who knows the run and pays for its
moves, and over the free-switching bound, which is no policy at all (mathematics.md, part D)."""

from collections.abc import Iterator, Sequence

from simulator.results import Results, Run
from simulator.statistics import PAIRS_MIN, Interval, mean_interval
from simulator.table import Grid, shown

CLAIRVOYANT = "clairvoyant"
WITHIN = 1.5
"""What the system's Phi is to be at most, in times the clairvoyant's."""
TITLE = "Phi, in times that of who knows the run"


def over_clairvoyant(runs: Sequence[Run], policy: str, seed: int) -> Interval | None:
    """Phi of a policy over the clairvoyant's, world by world; None where no world has both."""
    known = {run.world: run.metrics.phi for run in runs if run.policy == CLAIRVOYANT}
    return _mean([(run.metrics.phi, known.get(run.world)) for run in runs if run.policy == policy], seed)


def over_bound(runs: Sequence[Run], policy: str, seed: int) -> Interval | None:
    """Phi of a policy over that of free switching, world by world; None where neither is known."""
    return _mean([(run.metrics.phi, run.metrics.phi_bound) for run in runs if run.policy == policy], seed)


def grid(found: Results, runs: Sequence[Run], seed: int) -> Grid:
    """A row for each policy, and one for the bound itself, of which there is no run."""
    header = ("policy", "Phi", "over the clairvoyant's", "over free switching")
    rows = []
    for policy in found.policies:
        own = [run for run in runs if run.policy == policy]
        phi = _mean([(run.metrics.phi, 1.0) for run in own], seed)
        ratios = (over_clairvoyant(runs, policy, seed), over_bound(runs, policy, seed))
        rows.append((policy, *map(shown, (phi, *ratios))))
    bounds = {run.world: run.metrics.phi_bound for run in runs}
    known = {run.world: run.metrics.phi for run in runs if run.policy == CLAIRVOYANT}
    least = (_mean([(phi, 1.0) for phi in bounds.values()], seed), _mean([(bounds[w], known[w]) for w in known], seed))
    rows.append(("free switching (a bound, not a policy)", *map(shown, least), "-"))
    return Grid(TITLE, header, tuple(rows))


def sentences(found: Results, runs: Sequence[Run], where: str, seed: int) -> Iterator[str]:
    """What is to be said of the system's distance, unless it is surely near enough."""
    ratio = over_clairvoyant(runs, found.system, seed)
    if ratio is None or found.system == CLAIRVOYANT:
        return
    said = f"Phi{where}: {found.system} costs {shown(ratio)} times what the clairvoyant does"
    if ratio.count < PAIRS_MIN:
        yield f"{said}; {ratio.count} seeds do not tell whether that is at most {WITHIN:g}"
    elif ratio.low > WITHIN:
        yield f"{said}, which is more than {WITHIN:g}"
    elif ratio.high > WITHIN:
        yield f"{said}, which may be more than {WITHIN:g}"
    if ratio.high < 1.0 and ratio.count >= PAIRS_MIN:
        yield f"{said}: who knows the run plans by predictions too, in slots, and among candidates that are not all"


def _mean(pairs: Sequence[tuple[float | None, float | None]], seed: int) -> Interval | None:
    ratios = [a / b for a, b in pairs if a is not None and b]
    return mean_interval(ratios, seed) if ratios else None

"""Scenarios as TOML files: read, varied for a sweep, and refused in the words of the file."""

from collections.abc import Mapping
from difflib import get_close_matches
from itertools import product
from math import inf, prod
from pathlib import Path
from typing import Any

from schemas.toml import document, keys_at, no_key, refused, shown, validated
from simulator.residency.scenario import ResidencyScenario
from simulator.scenario import Scenario
from simulator.tiers.scenario import TwoTierScenario

VARIANTS_MAX = 1000
"""Of one sweep: each of them is run under every policy and every seed."""
T_MIG_S = 2.0
"""T_mig of the sweep over chi: a few blocks of a hundred megabytes, loaded from a disk of 500 MB/s and warmed."""
DETECTION_S = 5.0
"""Of the sweep over chi: one planning period, which is also how long a node must be silent to be lost."""
CHI = "chi"
LIKE = "like"
"""In a file: another one beside it, whose tables hold where this one does not say otherwise."""


def shipped() -> dict[str, Path]:
    """The scenarios that come with Resplit, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "scenarios").glob("*.toml"))}


def read(path: Path) -> Scenario | TwoTierScenario | ResidencyScenario:
    """Whichever kind of scenario a file holds: one with `services` is of two tiers, one with `models` of many models.
    Raises as `read_scenario` does."""
    plain = _tables(path)
    if "services" in plain:
        return validated(TwoTierScenario, plain, str(path))
    if "models" in plain:
        return validated(ResidencyScenario, plain, str(path))
    return _scenario(plain, path)


def read_scenario(path: Path) -> Scenario:
    """The scenario of a file; `workload.trace` is then a path that can be opened from here.

    Raises `ResplitError(INVALID_REQUEST)` naming the file, the key with dots, its value, and for a key that there is
    not the nearest one that there is.
    """
    return _scenario(_tables(path), path)


def _tables(path: Path) -> dict[str, Any]:
    """What a file says, and the one that it is like."""
    plain = _document(path)
    if (like := plain.pop(LIKE, None)) is None:
        return plain
    other = path.parent / str(like)
    if not isinstance(like, str) or not other.is_file():
        raise refused(f"{path}: {LIKE}: there is no file {other} (got {like!r})", LIKE)
    return {**_document(other), **plain}


def _document(path: Path) -> dict[str, Any]:
    known = list(shipped())
    near = get_close_matches(path.name, known, 1)
    others = f"{near[0]!r} is one" if near else ", ".join(known)
    return document(path, "scenario", f"; of the scenarios that come with Resplit: {others}")


def _scenario(plain: Mapping[str, Any], path: Path) -> Scenario:
    scenario = validated(Scenario, plain, str(path))
    if scenario.workload.trace is not None:
        trace = path.parent / scenario.workload.trace
        if not trace.is_file():
            message = f"{path}: workload.trace: there is no file {trace} (got {scenario.workload.trace!r})"
            raise refused(message, "workload.trace")
        workload = scenario.workload.model_copy(update={"trace": str(trace)})
        scenario = scenario.model_copy(update={"workload": workload})
    for key, values in scenario.sweep.items():
        for value in values:
            _varied(scenario, key, value, f"{path}: sweep")
    return scenario


def with_value(scenario: Scenario, key: str, value: object) -> Scenario:
    """The scenario with another value under a key written with dots, as `sites.3.nodes`.

    Raises as `read_scenario` does, with the scenario's name for the file.
    """
    return _with_value(scenario, key, value, f"scenario {scenario.name!r}")


def at_chi(scenario: Scenario, chi: float, t_mig_s: float = T_MIG_S, detection_s: float = DETECTION_S) -> Scenario:
    """The scenario in which some node becomes slow `chi` times as seldom as one can react to it.

    chi = time between environment changes / (T_mig + detection delay) (mathematics.md, part D), a change being that any
    node of the cluster becomes slow. Each is slow for half as long as it was not.
    """
    return _at_chi(scenario, chi, t_mig_s + detection_s, f"scenario {scenario.name!r}")


def swept(scenario: Scenario) -> list[tuple[dict[str, float], Scenario]]:
    """Every combination of the values of `scenario.sweep`, each with the scenario that it makes; without a sweep the
    scenario alone. `chi` stands for `at_chi`, every other key is one of the file."""
    keys = list(scenario.sweep)
    total = prod(len(values) for values in scenario.sweep.values())
    if total > VARIANTS_MAX:
        raise refused(f"scenario {scenario.name!r}: sweep: {total} combinations; {VARIANTS_MAX} at most", "sweep")
    found = []
    for combination in product(*scenario.sweep.values()):
        one = scenario.model_copy(update={"sweep": {}})
        for key, value in zip(keys, combination, strict=True):
            one = _varied(one, key, value, f"scenario {scenario.name!r}: sweep")
        found.append((dict(zip(keys, combination, strict=True)), one))
    return found


def _varied(scenario: Scenario, key: str, value: float, source: str) -> Scenario:
    if key == CHI:
        return _at_chi(scenario, value, T_MIG_S + DETECTION_S, source)
    return _with_value(scenario, key, value, source)


def _at_chi(scenario: Scenario, chi: float, reaction_s: float, source: str) -> Scenario:
    if not 0 < chi < inf:
        raise refused(f"{source}: {CHI}: it is a finite number above 0 (got {chi})", CHI)
    # A node's turn comes once in so many, and a turn is the time in which it is well and the time in which it is slow.
    well_s = chi * reaction_s * sum(site.nodes for site in scenario.sites) / 1.5
    slower = _with_value(scenario, "churn.slow_every_s", well_s, source)
    return _with_value(slower, "churn.slow_s", well_s / 2, source)


def _with_value(scenario: Scenario, key: str, value: object, source: str) -> Scenario:
    plain: Any = scenario.model_dump()
    parts = key.split(".")
    place = plain
    for position, part in enumerate(parts):
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                before = ".".join(parts[:position])
                message = f"{before} has {len(place)} entries, from 0, and no {part!r} (got {shown(value)})"
                raise refused(f"{source}: {key}: {message}", key)
        elif part not in (known := keys_at(Scenario, parts[:position], plain)):
            raise refused(f"{source}: {key}: {no_key(part, known)} (got {shown(value)})", key)
        inner: Any = int(part) if isinstance(place, list) else part
        if position == len(parts) - 1:
            place[inner] = value
            break
        held = place[inner] if isinstance(place, list) else place.get(inner)
        # A table that was left out has no keys yet.
        place[inner] = {} if held is None else list(held) if isinstance(held, tuple) else held
        place = place[inner]
    return validated(Scenario, plain, source)

"""Scenarios as TOML files: read, varied for a sweep, and refused in the words of the file."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import product
from math import inf, prod
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from schemas.base import Value
from schemas.errors import ErrorCode, ResplitError
from simulator.scenario import Scenario

FILE_BYTES_MAX = 4 << 20
"""Ten thousand sites and as many faults are about two megabytes."""
VARIANTS_MAX = 1000
"""Of one sweep: each of them is run under every policy and every seed."""
T_MIG_S = 2.0
"""T_mig of the sweep over chi: a few blocks of a hundred megabytes, loaded from a disk of 500 MB/s and warmed."""
DETECTION_S = 5.0
"""Of the sweep over chi: one planning period, which is also how long a node must be silent to be lost."""
CHI = "chi"


def shipped() -> dict[str, Path]:
    """The scenarios that come with Resplit, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "scenarios").glob("*.toml"))}


def read_scenario(path: Path) -> Scenario:
    """The scenario of a file; `workload.trace` is then a path that can be opened from here.

    Raises `ResplitError(INVALID_REQUEST)` naming the file, the key with dots, its value, and for a key that there is
    not the nearest one that there is.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        near = get_close_matches(path.name, shipped(), 1)
        others = f"{near[0]!r} is one" if near else ", ".join(shipped())
        hint = f"; of the scenarios that come with Resplit: {others}"
        raise _refused(f"cannot read {path}: {error.strerror}{hint}", "file") from error
    if len(data) > FILE_BYTES_MAX:
        raise _refused(f"{path} has more than {FILE_BYTES_MAX} bytes and is no scenario", "file")
    try:
        plain = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise _refused(f"{path} is not valid TOML: {error}", "file") from error
    scenario = _validated(plain, str(path))
    if scenario.workload.trace is not None:
        trace = path.parent / scenario.workload.trace
        if not trace.is_file():
            message = f"{path}: workload.trace: there is no file {trace} (got {scenario.workload.trace!r})"
            raise _refused(message, "workload.trace")
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
        raise _refused(f"scenario {scenario.name!r}: sweep: {total} combinations; {VARIANTS_MAX} at most", "sweep")
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
        raise _refused(f"{source}: {CHI}: it is a finite number above 0 (got {chi})", CHI)
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
                message = f"{before} has {len(place)} entries, from 0, and no {part!r} (got {_shown(value)})"
                raise _refused(f"{source}: {key}: {message}", key)
        elif part not in (known := _keys_at(parts[:position], plain)):
            raise _refused(f"{source}: {key}: {_no_key(part, known)} (got {_shown(value)})", key)
        inner: Any = int(part) if isinstance(place, list) else part
        if position == len(parts) - 1:
            place[inner] = value
            break
        held = place[inner] if isinstance(place, list) else place.get(inner)
        # A table that was left out has no keys yet.
        place[inner] = {} if held is None else list(held) if isinstance(held, tuple) else held
        place = place[inner]
    return _validated(plain, source)


def _validated(plain: Mapping[str, Any], source: str) -> Scenario:
    try:
        return Scenario.model_validate(_strict(plain), strict=True)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False), plain, source) from error


def _strict(plain: object) -> Any:
    """What a file says, so that it can be read strictly: arrays are tuples, and 3e9 is a whole number."""
    match plain:
        case Mapping():
            return {key: _strict(value) for key, value in plain.items()}
        case list() | tuple():
            return tuple(_strict(value) for value in plain)
        case float() if plain.is_integer():
            return int(plain)
    return plain


RANKS = {"extra_forbidden": 0, "tuple_type": 2, "missing": 3, "too_short": 4}
"""A misspelt key is also a missing one, and an array with a wrong entry also too short: the cause is named. Where a
word may stand for an array, the words are."""
TOML_TYPES = {
    "tuple_type": "an array is needed here",
    "dict_type": "a table is needed here",
    "model_type": "a table is needed here",
    "missing": "a value is needed here",
}


def _explained(errors: Sequence[ErrorDetails], plain: Mapping[str, Any], source: str) -> ResplitError:
    first = min(errors, key=lambda error: RANKS.get(error["type"], 1))
    # Where a value may be of several types, pydantic names the type between the keys: `tuple[Stage, ...]`.
    path = [str(part) for part in first["loc"] if "[" not in str(part)]
    value = first["input"]
    if first["type"] == "extra_forbidden":
        what = f"{_no_key(path[-1], _keys_at(path[:-1], plain))} (got {_shown(value)})"
    elif first["type"] in TOML_TYPES:
        what = TOML_TYPES[first["type"]] + ("" if first["type"] == "missing" else f" (got {_shown(value)})")
    elif isinstance(value, Mapping):
        # A check of a whole table says itself which key of it is at fault.
        told = first["msg"].removeprefix("Value error, ")
        if (named := re.match(r"([a-z_]+(?:\.\w+)*): (.*)", told, re.DOTALL)) is not None:
            path, what = [*path, *named[1].split(".")], named[2]
        else:
            what = told
    else:
        what = f"{first['msg']} (got {_shown(value)})"
    key = ".".join(path)
    return _refused(f"{source}: {key}: {what}" if key else f"{source}: {what}", key or "file")


def _no_key(name: str, known: Sequence[str]) -> str:
    # A part of a key, or a key and more, is nearer than what happens to share letters with it.
    alike = [key for key in known if name and (key.startswith(name) or name.startswith(key))]
    near = get_close_matches(name, alike, 1, cutoff=0.0) or get_close_matches(name, known, 1)
    if near:
        return f"there is no key {name!r}; did you mean {near[0]!r}?"
    return f"there is no key {name!r}; the keys here are {', '.join(known)}" if known else f"there is no key {name!r}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(path: Sequence[str], plain: object) -> list[str]:
    """The keys that a table may have: its fields, or where it is open those that it has."""
    kind = _kind_at(path)
    if isinstance(kind, type) and issubclass(kind, Value):
        return [*kind.model_fields]
    for part in path:
        if isinstance(plain, list | tuple) and part.isdecimal() and int(part) < len(plain):
            plain = plain[int(part)]
        elif isinstance(plain, Mapping):
            plain = plain.get(part)
    return [*plain] if isinstance(plain, Mapping) else []


def _kind_at(path: Sequence[str]) -> Any:
    """The type of what stands at a path in a scenario; None where there is nothing."""
    kind: Any = Scenario
    for part in path:
        if isinstance(kind, type) and issubclass(kind, Value):
            field = kind.model_fields.get(part)
            kind = None if field is None else _plain_type(field.annotation)
        elif get_origin(kind) is tuple:
            kind = _plain_type(get_args(kind)[0])
        elif get_origin(kind) is dict:
            kind = _plain_type(get_args(kind)[1])
        else:
            return None
    return kind


def _plain_type(kind: Any) -> Any:
    """Without what is said about it, and without None."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, UnionType):
            kind = next(arm for arm in get_args(kind) if arm is not type(None))
        else:
            return kind


def _refused(message: str, key: str) -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, message, key)

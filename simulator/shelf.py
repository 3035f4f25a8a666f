"""Runs that were done before, kept in a folder, so that a comparison of hours that ended early goes on where it was.

A run is found again by all that makes it what it is: its scenario, trace, policy and seed, and the source of the code
that it goes through.
"""

import ast
import hashlib
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from schemas.base import Value
from simulator.results import Run, Timeline
from simulator.scenario import Scenario

ROOT = Path(__file__).parents[1]
RUN = "simulator.runner"
"""What it imports, and what that imports, and so on, is what a run goes through."""
DATA = ("simulator/learned.json",)
LIBRARIES = ("numpy", "pydantic", "scipy")


class Done(Value):
    """What came of a run."""

    run: Run
    timeline: Timeline | None = None


class Shelf:
    """Where runs are kept."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def find(self, scenario: Scenario, policy: str, seed: int, shows: bool) -> Done | None:
        """The same run, if it was done; None where its file cannot be read, or has no timeline and one is wanted."""
        try:
            done = Done.model_validate_json(self._place(scenario, policy, seed).read_bytes())
        except (OSError, ValidationError):
            return None
        return None if shows and done.timeline is None else done

    def keep(self, scenario: Scenario, policy: str, seed: int, done: Done) -> None:
        """Whole or not at all."""
        place = self._place(scenario, policy, seed)
        beside = place.with_suffix(f".{os.getpid()}")
        beside.write_text(done.model_dump_json())
        beside.replace(place)

    def _place(self, scenario: Scenario, policy: str, seed: int) -> Path:
        trace = scenario.workload.trace
        parts = (
            source_digest(),
            scenario.model_dump_json(),
            "" if trace is None else hashlib.sha256(Path(trace).read_bytes()).hexdigest(),
            policy,
            str(seed),
        )
        return self._folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.json"


@cache
def source_digest() -> str:
    """Of all code that a run goes through, and of the libraries that it reckons with."""
    found = hashlib.sha256(" ".join(version(name) for name in LIBRARIES).encode())
    for path in [*sources(RUN), *(ROOT / name for name in DATA)]:
        found.update(path.relative_to(ROOT).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def sources(module: str) -> list[Path]:
    """The files of a module of ours and of all modules of ours that it leads to."""
    found: set[Path] = set()
    todo = [module]
    while todo:
        path = _file_of(todo.pop())
        if path is None or path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                todo += [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                todo += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    return sorted(found)


def _file_of(module: str) -> Path | None:
    place = ROOT.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)

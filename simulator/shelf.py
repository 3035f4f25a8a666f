"""Runs that were done before, kept in a folder, so that a comparison of hours that ended early goes on where it was.

A run is found again by all that makes it what it is: its scenario, trace, policy and seed, say, and the source of the
code that it goes through.
"""

import ast
import hashlib
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from schemas.base import Value

ROOT = Path(__file__).parents[1]
DATA = ("simulator/learned.json",)
LIBRARIES = ("numpy", "pydantic", "scipy")


Kept = TypeVar("Kept", bound=Value)


class Shelf(Generic[Kept]):
    """Where runs of one kind are kept."""

    def __init__(self, folder: Path, kind: type[Kept], run: Callable[..., Kept]) -> None:
        """`run` makes them. What its module imports, and what that imports, and so on, is what a run goes through."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._kind = kind
        self._module = run.__module__

    def find(self, *made_of: str) -> Kept | None:
        """What came of the same run, if it was done; None where its file cannot be read, too."""
        try:
            return self._kind.model_validate_json(self._place(made_of).read_bytes())
        except (OSError, ValidationError):
            return None

    def keep(self, done: Kept, *made_of: str) -> None:
        """Whole or not at all."""
        place = self._place(made_of)
        beside = place.with_suffix(f".{os.getpid()}")
        beside.write_text(done.model_dump_json())
        beside.replace(place)

    def _place(self, made_of: tuple[str, ...]) -> Path:
        parts = (source_digest(self._module), *made_of)
        return self._folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.json"


@cache
def source_digest(module: str) -> str:
    """Of all code that a run goes through, and of the libraries that it reckons with."""
    found = hashlib.sha256(" ".join(version(name) for name in LIBRARIES).encode())
    for path in [*sources(module), *(ROOT / name for name in DATA)]:
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

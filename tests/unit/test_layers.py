"""Imports run downward only: a package imports from lower floors, or from itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "deploy": 0,
    "schemas": 0,
    "natstls": 0,
    "bus": 1,
    "models": 1,
    "profiler": 2,
    "agent": 3,
    "orchestrator": 3,
    "simulator": 4,
    "resplit": 5,
    "benchmarks": 6,
}


def imported(source: str) -> set[str]:
    """The top-level packages that a module imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which floor they reach"
            found.add((node.module or "").split(".")[0])
    return found


def upward(package: str, source: str) -> set[str]:
    """Packages that a module of `package` must not import, but does."""
    others = imported(source) & set(FLOORS) - {package}
    return {other for other in others if FLOORS[other] >= FLOORS[package]}


@pytest.mark.parametrize("package", FLOORS)
def test_no_module_imports_from_its_own_floor_or_above(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not upward(package, path.read_text()), path


def test_an_upward_import_is_found_even_inside_a_function() -> None:
    assert upward("agent", "def f():\n    from orchestrator.fold import fold\n") == {"orchestrator"}
    assert upward("models", "import resplit.client") == {"resplit"}
    assert not upward("agent", "import schemas.plan\nfrom bus import keys\n")


def test_the_client_imports_none_of_our_other_packages_but_natstls() -> None:
    todo, seen = ["resplit.client"], set[str]()
    while todo:
        name = todo.pop()
        seen.add(name)
        source = (ROOT / (name.replace(".", "/") + ".py")).read_text()
        assert imported(source) & set(FLOORS) <= {"resplit", "natstls"}, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resplit."):
                todo += [node.module] if node.module and node.module not in seen else []

"""What was run is not run again; what was run otherwise, or cannot be read, is."""

from pathlib import Path

import pytest

from simulator.files import read_scenario, shipped, with_value
from simulator.results import Run
from simulator.runner import Job, simulate
from simulator.scenario import Scenario
from simulator.shelf import DATA, ROOT, RUN, Shelf, sources

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return with_value(read_scenario(shipped()["small"]), "duration_s", 40.0)


@pytest.fixture(scope="module")
def folder(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a comparison has left its runs."""
    found = tmp_path_factory.mktemp("runs")
    simulate(scenario, ["static"], SEEDS, "", 1, lambda job, run: None, Shelf(found))
    return found


def test_a_comparison_that_is_repeated_runs_nothing(
    scenario: Scenario, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = simulate(scenario, ["static"], SEEDS, "", 1, lambda job, run: None)
    heard: list[tuple[Job, Run]] = []
    with monkeypatch.context() as changed:
        changed.delattr("simulator.runner.run_one")
        again = simulate(scenario, ["static"], SEEDS, "", 1, lambda job, run: heard.append((job, run)), Shelf(folder))
    assert [job.seed for job, _ in heard] == list(SEEDS)
    assert again.shown == whole.shown
    assert [run.metrics.qos for run in again.runs] == [run.metrics.qos for run in whole.runs]


def test_another_policy_seed_or_scenario_was_not_run(scenario: Scenario, folder: Path) -> None:
    shelf = Shelf(folder)
    assert shelf.find(scenario, "static", 1, shows=True) is not None
    assert shelf.find(scenario, "static", 2, shows=True) is None, "nobody asked for its timeline"
    assert shelf.find(scenario, "static", 2, shows=False) is not None
    assert shelf.find(scenario, "full", 1, shows=False) is None
    assert shelf.find(scenario, "static", 3, shows=False) is None
    assert shelf.find(with_value(scenario, "duration_s", 41.0), "static", 1, shows=False) is None


def test_other_code_runs_it_anew(scenario: Scenario, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulator.shelf.source_digest", lambda: "other")
    assert Shelf(folder).find(scenario, "static", 1, shows=False) is None


def test_the_code_of_a_run_is_what_it_leads_to() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in sources(RUN)}
    assert {
        "simulator/world.py",
        "orchestrator/trigger.py",
        "agent/stage.py",
        "profiler/forecast.py",
        "simulator/metrics.py",
    } <= found
    assert not any(path.startswith(("resplit/", "benchmarks/", "tests/")) for path in found)
    assert "orchestrator/shell.py" not in found, "no run has sockets"
    assert all((ROOT / name).is_file() for name in DATA)


def test_a_file_that_was_cut_off_is_no_run(scenario: Scenario, folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert Shelf(folder).find(scenario, "static", 1, shows=False) is None

"""What was run is not run again; what was run otherwise, or cannot be read, is."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from simulator.files import read, read_scenario, shipped, with_value
from simulator.results import Results
from simulator.runner import Done, Job, run_one, simulate
from simulator.scenario import Scenario
from simulator.shelf import DATA, ROOT, Shelf, sources
from simulator.tiers import results as tiers
from simulator.tiers.results import TierRun
from simulator.tiers.scenario import TwoTierScenario

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return with_value(read_scenario(shipped()["small"]), "duration_s", 40.0)


@pytest.fixture(scope="module")
def folder(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a comparison has left its runs."""
    found = tmp_path_factory.mktemp("runs")
    simulate(scenario, ["static"], SEEDS, "", 1, lambda job, run: None, shelf_in(found))
    return found


def shelf_in(folder: Path) -> Shelf[Done]:
    return Shelf(folder, Done, run_one)


def again(scenario: Scenario, seeds: Sequence[int], folder: Path, policy: str = "static") -> tuple[Results, set[int]]:
    """What a comparison finds with the shelf in `folder`, and the seeds that it ran all the same."""
    ran: set[int] = set()

    def run(job: Job) -> Done:
        ran.add(job.seed)
        return run_one(job)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("simulator.runner.run_one", run)
        found = simulate(scenario, [policy], seeds, "", 1, lambda job, run: None, shelf_in(folder))
    return found, ran


def test_a_comparison_that_is_repeated_runs_nothing(scenario: Scenario, folder: Path) -> None:
    whole = simulate(scenario, ["static"], SEEDS, "", 1, lambda job, run: None)
    found, ran = again(scenario, SEEDS, folder)
    assert not ran
    assert found.shown == whole.shown
    assert [run.seed for run in found.runs] == list(SEEDS)
    assert [run.metrics.qos for run in found.runs] == [run.metrics.qos for run in whole.runs]


def test_another_policy_seed_or_scenario_was_not_run(scenario: Scenario, folder: Path, tmp_path: Path) -> None:
    apart = Path(shutil.copytree(folder, tmp_path / "runs"))
    assert again(scenario, (1, 3), apart)[1] == {3}
    assert again(scenario, (2,), apart)[1] == {2}, "nobody asked for its timeline"
    assert again(scenario, (1,), apart, "static-start")[1] == {1}
    assert again(with_value(scenario, "duration_s", 41.0), (1,), apart)[1] == {1}


def test_other_code_runs_it_anew(
    scenario: Scenario, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = Path(shutil.copytree(folder, tmp_path / "runs"))
    monkeypatch.setattr("simulator.shelf.source_digest", lambda module: "other")
    assert again(scenario, (1,), apart)[1] == {1}


def test_a_file_that_was_cut_off_is_no_run(scenario: Scenario, folder: Path, tmp_path: Path) -> None:
    apart = Path(shutil.copytree(folder, tmp_path / "runs"))
    for path in apart.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert again(scenario, (1,), apart)[1] == {1}


def test_runs_of_two_tiers_are_kept_too(tmp_path: Path) -> None:
    table = read(shipped()["two-tier"])
    assert isinstance(table, TwoTierScenario)
    short = table.model_copy(update={"slots": 40, "warmup_slots": 10, "loads": (0.5,)})
    shelf = Shelf(tmp_path, TierRun, tiers.run_one)
    whole = tiers.CONTEST.compare(short, ["cloud-only"], SEEDS, "", 1, lambda: None, shelf)
    idle = replace(tiers.CONTEST, run=lambda job: pytest.fail("it was run"))
    assert idle.compare(short, ["cloud-only"], SEEDS, "", 1, lambda: None, shelf).runs == whole.runs
    assert [run.seed for run in whole.runs] == list(SEEDS)


@pytest.mark.parametrize(
    ("run", "through"),
    [
        (
            run_one,
            [
                "simulator/world.py",
                "simulator/metrics.py",
                "orchestrator/trigger.py",
                "agent/stage.py",
                "profiler/forecast.py",
            ],
        ),
        (tiers.run_one, ["simulator/tiers/world.py", "simulator/tiers/paper.py", "orchestrator/services/light.py"]),
    ],
)
def test_the_code_of_a_run_is_what_it_leads_to(run: Callable[..., object], through: list[str]) -> None:
    found = {path.relative_to(ROOT).as_posix() for path in sources(run.__module__)}
    assert set(through) <= found
    assert not any(path.startswith(("resplit/", "benchmarks/", "tests/")) for path in found)
    assert "orchestrator/shell.py" not in found, "no run has sockets"
    assert all((ROOT / name).is_file() for name in DATA)

"""`resplit simulate`: what it prints, what it writes, and how it refuses."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from resplit.cli import app
from resplit.commands.simulate import seeds_of
from resplit.exits import Exit
from schemas.errors import ResplitError
from simulator.files import shipped
from simulator.results import load


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)], catch_exceptions=False)


def test_without_a_scenario_it_names_those_that_there_are() -> None:
    told = run()
    assert told.exit_code == 0
    assert "smart-city" in told.stdout
    assert "unperturbed" in told.stdout


def test_a_scenario_is_run_and_reported(tmp_path: Path) -> None:
    told = run("small", "--seeds", "10-11", "--jobs", 1, "--report", tmp_path / "report")
    assert told.exit_code == 0, told.output
    assert "QoS" in told.stdout
    page = (tmp_path / "report" / "report.html").read_text()
    assert "the full system" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    results = load(tmp_path / "report" / "results.json")
    assert {(one.policy, one.seed) for one in results.runs} == {(p, s) for p in ("static", "full") for s in (10, 11)}


def test_what_it_found_can_be_had_as_json(tmp_path: Path) -> None:
    told = run("small", "--seeds", "3", "--policies", "full", "--jobs", 1, "--report", tmp_path, "--json")
    assert told.exit_code == 0
    assert json.loads(told.stdout)["runs"][0]["seed"] == 3


def short(tmp_path: Path, *more: str) -> Path:
    """Two tiers, for a tenth of the time."""
    (tmp_path / "two-tier.toml").write_text(shipped()["two-tier"].read_text())
    path = tmp_path / "short.toml"
    path.write_text("\n".join(["like = 'two-tier.toml'", "slots = 50", "warmup_slots = 10", *more]))
    return path


def test_two_tiers_are_run_and_reported_under_every_policy_where_none_is_named(tmp_path: Path) -> None:
    report = tmp_path / "report"
    told = run(short(tmp_path, "loads = [1.0, 2.0]"), "--seeds", "1", "--jobs", 1, "--report", report)
    assert told.exit_code == 0, told.output
    for word in ("on time", "Load 2", "What is aimed at", "clairvoyant"):
        assert word in told.stdout
    page = (report / "report.html").read_text()
    assert "drift plus penalty" in page
    assert page.count("data:image/png;base64,") == 3
    assert {path.name for path in report.iterdir()} == {
        *("report.html", "results.csv", "tables.csv", "results.json"),
        *("on-time-1.png", "on-time-2.png", "cost.png"),
    }
    assert len((report / "results.csv").read_text().splitlines()) == 1 + 2 * 9


def test_two_tiers_that_fit_nowhere_and_policies_that_there_are_not_are_refused(tmp_path: Path) -> None:
    full = run(
        short(tmp_path, "server = { cpu = [1.0, 2.0] }"), "--seeds", "1", "--jobs", 1, "--report", tmp_path / "r"
    )
    assert full.exit_code == Exit.REFUSED
    assert "more than the nodes hold" in full.output
    best = run(short(tmp_path), "--policies", "best")
    assert best.exit_code == Exit.USAGE
    assert "cloud-only" in best.output


@pytest.mark.parametrize(
    ("text", "seeds"), [("7", [7]), ("1,2,5", [1, 2, 5]), ("10-12", [10, 11, 12]), ("1-3,2,9", [1, 2, 3, 9])]
)
def test_seeds_are_numbers_and_ranges(text: str, seeds: list[int]) -> None:
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "x", "3-1", "-1", "0-99999999"])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ResplitError, match="--seeds"):
        seeds_of(text)


def test_an_unknown_policy_is_refused_with_those_there_are() -> None:
    told = run("small", "--policies", "best")
    assert told.exit_code == Exit.USAGE
    assert "always-argmin" in told.output


def test_a_cluster_that_cannot_hold_the_model_is_refused_before_anything_runs(tmp_path: Path) -> None:
    text = shipped()["small"].read_text()
    tight = tmp_path / "tight.toml"
    tight.write_text(re.sub(r"memory_bytes = \S+", "memory_bytes = 1_000_000", text))
    told = run(tight, "--report", tmp_path / "report")
    assert told.exit_code != 0
    assert "tight.toml" in told.output
    assert "short" in told.output
    assert "kinds.*.memory_bytes" in " ".join(told.output.split())


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = run("small", "--report", tmp_path / "file")
    assert told.exit_code == Exit.USAGE
    assert "--report" in told.output


def test_an_unknown_scenario_names_the_nearest(tmp_path: Path) -> None:
    told = run(tmp_path / "smal.toml")
    assert told.exit_code == Exit.USAGE
    assert "small" in told.output

"""Policies side by side: the table, the verdicts, what is said plainly, and the files that are written."""

import csv
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from schemas.errors import ErrorCode, ResplitError
from simulator import optimality, plots, report, table
from simulator.metrics import Metrics
from simulator.records import Spell
from simulator.results import BINS, Results, load, save, summary, timeline
from simulator.shortcomings import shortcomings
from simulator.statistics import Interval
from simulator.table import BY_KEY, COLUMNS, Cell, Grid, compare, paired, shown
from simulator.verdicts import privacy_level, privacy_verdict, seed_rows, verdict
from tests.synthetic_run import CLASSES, chain, epochs, outcome, result, results, runs_of, synthetic

PNG = b"\x89PNG\r\n\x1a\n"
SEEDS = range(10, 18)
BOUND_ROW = "free switching (a bound, not a policy)"


def between(low: float, high: float, count: int = 30) -> Interval:
    return Interval(mean=(low + high) / 2, low=low, high=high, count=count)


@cache
def usual() -> Results:
    """Four policies on eight seeds; a frozen value, so that tests may share it."""
    return results()


def qos(metrics: Metrics) -> float | None:
    return metrics.qos


def phi_times(factor: float) -> Results:
    """The usual ones, the system's Phi being so many times the clairvoyant's, and the bound being nine tenths of it."""
    runs = []
    for run in usual().runs:
        phi = {"full": factor, "clairvoyant": 1.0}.get(run.policy, 2.0) * (1 + run.seed / 100)
        metrics = run.metrics.model_copy(update={"phi": phi, "phi_bound": 0.9 * (1 + run.seed / 100)})
        runs.append(run.model_copy(update={"metrics": metrics}))
    return usual().model_copy(update={"runs": tuple(runs)})


# The verdict.


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        (between(60, 99), "beaten"),
        (between(90, 110), "reproduced"),
        (between(120, 300), "reproduced"),
        (between(290, 310), "not reproduced"),
        (between(400, 500), "not reproduced"),
    ],
)
def test_a_latency_is_reproduced_if_its_whole_interval_is_within_the_range_or_better(ours: Interval, word: str) -> None:
    assert verdict(ours, (300, 100), "lower").word == word


@pytest.mark.parametrize(
    ("ours", "word"),
    [(between(99.1, 99.9), "beaten"), (between(95, 99.9), "reproduced"), (between(94.9, 98), "not reproduced")],
)
def test_a_compliance_is_reproduced_likewise_where_more_is_better(ours: Interval, word: str) -> None:
    assert verdict(ours, (95, 99), "higher").word == word


def test_zero_incidents_reproduce_zero_to_two_since_less_than_none_there_is_not() -> None:
    assert verdict(between(0, 0), (2, 0), "lower").word == "reproduced"


@pytest.mark.parametrize(
    ("gain", "why"),
    [
        (between(-1, 2), "does as well"),
        (between(-3, -1), "does better"),
        (between(1, 2, count=3), "3 seeds cannot tell"),
    ],
)
def test_what_the_static_optimum_reaches_too_is_not_brought_by_adapting(gain: Interval, why: str) -> None:
    found = verdict(between(97, 98), (95, 99), "higher", gain)
    assert found.word == "not reproduced"
    assert why in found.why
    assert verdict(between(97, 98), (95, 99), "higher", between(1, 2)).word == "reproduced"


def test_a_gain_in_latency_is_a_negative_one() -> None:
    assert verdict(between(150, 200), (300, 100), "lower", between(-20, -10)).word == "reproduced"
    assert verdict(between(150, 200), (300, 100), "lower", between(10, 20)).word == "not reproduced"


def test_privacy_is_high_only_if_nothing_was_broken_and_nothing_exposed() -> None:
    clean, exposed, broken = (synthetic("full", 10) for _ in range(3))
    exposed.outcomes[0].exposed = True
    broken.violations.append("block 0 on an untrusted node")
    levels = [privacy_level([summary(run, CLASSES)]) for run in (clean, exposed, broken)]
    assert levels == ["high", "moderate", "low"]
    assert privacy_verdict("moderate", "high").word == "not reproduced"
    assert privacy_verdict("high", "moderate").word == "beaten"
    assert privacy_verdict("high", "high", static="moderate").word == "reproduced"
    assert privacy_verdict("high", "high", static="high").word == "not reproduced"


def test_the_seeds_own_rows_stand_with_the_papers_ranges_and_both_verdicts() -> None:
    rows = {row.title: row for row in seed_rows(runs_of("static", SEEDS), runs_of("full", SEEDS), 0)}
    assert list(rows) == [
        "latency, p50 (ms)",
        "latency, p95 (ms)",
        "utilisation (%)",
        "goodput utilisation (%)",
        "downtime incidents (/h)",
        "QoS compliance (%)",
        "privacy",
    ]
    latency = rows["latency, p50 (ms)"]
    assert (latency.paper_static, latency.paper_adaptive) == ("500 to 1000", "100 to 300")
    assert latency.static_verdict is not None and latency.static_verdict.word == "beaten"
    assert latency.system_verdict is not None and latency.system_verdict.word == "reproduced"
    compliance = rows["QoS compliance (%)"].system_verdict
    assert compliance is not None and compliance.word == "not reproduced"


# The table.


def test_a_difference_is_better_or_worse_only_beyond_chance_and_by_what_the_metric_wants() -> None:
    assert Cell(between(1, 2), between(1, 2), "higher").word == "better"
    assert Cell(between(1, 2), between(1, 2), "lower").word == "worse"
    assert Cell(between(1, 2), between(-1, 2), "lower").word == ""
    assert Cell(between(1, 2), between(1, 2), None).word == "differs"
    assert Cell(between(1, 2), None, "lower").word == ""


def test_the_reference_is_held_against_nothing_and_the_others_against_it() -> None:
    found = usual()
    compared = compare(found.runs, list(found.policies), "static", [BY_KEY["qos_percent"]], 0)
    rows = {policy: cells[0] for policy, cells in compared.rows}
    assert list(rows) == list(found.policies)
    assert rows["static"].against is None
    assert [rows[name].word for name in ("greedy", "full", "clairvoyant")] == ["worse", "better", "better"]


def test_runs_that_met_other_worlds_are_no_pair() -> None:
    static, full = runs_of("static", SEEDS), runs_of("full", SEEDS)
    other = [run.model_copy(update={"trace_hash": "elsewhere"}) if run.seed < 12 else run for run in full]
    found = paired(other, static, qos, 0)
    assert found is not None and found.count == len(SEEDS) - 2
    assert paired(other[:2], static, qos, 0) is None


def test_points_of_a_sweep_are_paired_each_with_its_own() -> None:
    low, high = (runs_of("static", [10], {"chi": chi}) for chi in (0.1, 30.0))
    assert paired(low, high, qos, 0) is None
    assert paired(low + high, high + low, qos, 0) == Interval(mean=0, low=0, high=0, count=2)


def test_a_metric_that_no_run_has_is_a_dash() -> None:
    compared = compare(runs_of("full", SEEDS), ["full"], "static", [BY_KEY["gap_percent"]], 0)
    assert table.grid(compared, "t").rows == (("full", "-"),)


def test_a_number_has_as_many_decimals_as_its_size_asks_for() -> None:
    assert shown(between(1234, 1236)) == "1,235 [1,234, 1,236]"
    assert shown(between(1.5, 2.5), signed=True) == "+2.00 [+1.50, +2.50]"
    assert shown(between(7, 7)) == "7.00"
    assert shown(between(0, 0), signed=True) == "0"
    assert shown(None) == "-"


def test_a_grid_is_the_same_in_the_terminal_in_markdown_and_in_csv() -> None:
    made = Grid("t", ("policy", "QoS %"), (("a|b", "98 [97, 99]\n+1 better"),))
    assert table.markdown(made) == ["| policy | QoS % |", "| --- | ---: |", "| a\\|b | 98 [97, 99]<br>+1 better |"]
    assert table.csv_rows(made) == [["policy", "QoS %"], ["a|b", "98 [97, 99]; +1 better"]]
    console = Console(width=80, file=StringIO(), record=True)
    console.print(table.terminal(made))
    assert "98 [97, 99]" in console.export_text()


def test_the_tables_of_the_report_show_every_metric() -> None:
    assert {key for keys in report.GROUPS.values() for key in keys} == {column.key for column in COLUMNS}


# What is said plainly.


def test_a_broken_invariant_a_cut_run_and_few_seeds_are_said_first() -> None:
    found = results(seeds=[9, 10])
    runs = list(found.runs)
    runs[0] = runs[0].model_copy(update={"violations": ("two owners of block 3",), "finished": "cut short"})
    said = shortcomings(found.model_copy(update={"runs": tuple(runs)}), 0)
    assert said[0] == "static, seed 9 broke an invariant: two owners of block 3"
    assert said[1].startswith("static, seed 9 was cut short")
    assert "2 seeds are too few" in said[2]
    assert said[3] == "seeds 9 are among those that parameters are tuned on"


def test_where_others_are_ahead_is_said_and_a_bound_is_no_other() -> None:
    said = shortcomings(usual(), 0)
    assert "downtime incidents /h: full is worse than static" in said
    assert "goodput utilisation %: no difference between full and static beyond chance" in said
    assert not any("clairvoyant" in sentence for sentence in said)


def test_a_thousand_violations_are_counted_rather_than_listed() -> None:
    found = results(seeds=[10])
    worst = found.runs[0].model_copy(update={"violations": tuple(f"no {number}" for number in range(1000))})
    said = shortcomings(found.model_copy(update={"runs": (worst, *found.runs[1:])}), 0)
    assert "and 980 more violations, which results.json lists" in said
    assert len(said) < 40


def test_policies_that_met_other_worlds_are_named() -> None:
    found = usual()
    runs = [run.model_copy(update={"trace_hash": "x"}) if run.policy == "greedy" else run for run in found.runs]
    said = shortcomings(found.model_copy(update={"runs": tuple(runs)}), 0)
    assert any(sentence.startswith("greedy met worlds that static did not (seeds 10, 11") for sentence in said)


# Files and plots.


def test_results_are_read_again_as_they_were_written(tmp_path: Path) -> None:
    found = usual()
    save(tmp_path / "results.json", found)
    assert load(tmp_path / "results.json") == found


def test_a_file_that_is_missing_or_something_else_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ResplitError, match=r"results\.json: there is no such file"):
        load(tmp_path / "results.json")
    (tmp_path / "other.json").write_text('{"runs": 1}')
    with pytest.raises(ResplitError, match=r"other\.json \(is it a results\.json"):
        load(tmp_path / "other.json")


class Page(HTMLParser):
    """What a page holds and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.said += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """A report whose reasons and names are out to do harm."""
    harmful = synthetic("full", 10)
    reason = "node <script>alert(1)</script> & co was lost"
    harmful.epochs[1] = replace(harmful.epochs[1], reason=reason, cause="<b>node_lost</b>")
    found = results(shown=(timeline(harmful),))
    folder = tmp_path_factory.mktemp("report")
    report.write(folder, found)
    return folder, found


def test_the_page_fetches_nothing_and_runs_nothing(written: tuple[Path, Results]) -> None:
    text = (written[0] / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"https?://", text)
    assert "script" not in page.tags
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert not re.search(r"@import|url\(", text)


def test_a_reason_is_shown_as_it_is_said_and_never_as_markup(written: tuple[Path, Results]) -> None:
    text = (written[0] / "report.html").read_text()
    assert "<script>" not in text
    assert "<b>node_lost" not in text
    assert "node <script>alert(1)</script> & co was lost" in Page(text).said


def test_the_page_says_what_was_run_and_what_came_of_it(written: tuple[Path, Results]) -> None:
    said = Page((written[0] / "report.html").read_text()).said
    for part in (
        "A town & its drones",
        "resplit simulate test --seeds 10-17",
        "10, 11, 12, 13, 14, 15, 16, 17",
        "what greedy does",
        "world-10",
        "first plan",
        "redistribute",
        "re-split",
        "downtime incidents /h: full is worse than static",
        "beaten",
        "not reproduced",
    ):
        assert part in said


def test_beside_the_page_lie_its_plots_every_run_and_all_of_it(written: tuple[Path, Results]) -> None:
    folder, found = written
    names = {path.name for path in folder.iterdir()}
    assert {
        "report.html",
        "results.csv",
        "tables.csv",
        "results.json",
        "timeline-1-full.png",
        "gantt-1-full.png",
    } <= names
    assert all((folder / name).read_bytes().startswith(PNG) for name in names if name.endswith(".png"))
    assert load(folder / "results.json") == found
    rows = list(csv.DictReader(StringIO((folder / "results.csv").read_text())))
    assert [(row["policy"], int(row["seed"])) for row in rows] == [(run.policy, run.seed) for run in found.runs]
    first = found.runs[0].metrics
    assert first.qos is not None and float(rows[0]["qos_percent"]) == pytest.approx(100 * first.qos)
    assert rows[0]["gap_percent"] == ""


def test_a_sweep_is_drawn_as_curves_and_its_points_have_tables_of_their_own() -> None:
    runs = [run for chi in (0.1, 3.0) for name in ("static", "full") for run in runs_of(name, SEEDS, {"chi": chi})]
    found = usual().model_copy(update={"runs": tuple(runs), "shown": ()})
    drawn = report.pictures(found)
    assert [picture.name for picture in drawn] == [f"curve-chi-{key}.png" for key in report.PLOTTED]
    assert [part.title for part in report.parts(found)] == ["chi = 0.1", "chi = 3"]
    assert "No run was kept to be shown." in report.html(found, report.parts(found), drawn)


def test_a_timeline_holds_every_request_once_in_a_bounded_number_of_points() -> None:
    many = [outcome(at / 10, 0.1 if at % 50 else None) for at in range(36_000)]
    found = timeline(result(many))
    assert len(found.bins) == BINS
    assert sum(point.arrived for point in found.bins) == 36_000
    assert sum(point.failed for point in found.bins) == 720
    few = timeline(result([outcome(3600.0, 0.1)]))
    assert [(point.arrived, point.failed) for point in few.bins] == [(1, 0)]


def test_a_run_in_which_nothing_was_served_or_planned_is_drawn_all_the_same() -> None:
    empty, failed = timeline(result([])), timeline(result([outcome(5, None)], end_s=10))
    many = [(at, chain(*((f"n-{number}", number, number) for number in range(50)))) for at in (0.0, 5.0)]
    crowded = timeline(result([outcome(5, 0.1)], end_s=10, epochs=epochs(*many, end_s=10)))
    for each in (empty, failed, crowded):
        assert plots.timeline(each).startswith(PNG)
        assert plots.gantt(each).startswith(PNG)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResplitError, match="make setup") as error:
        report.write(tmp_path, results(seeds=[10]))
    assert error.value.code is ErrorCode.MISSING_DEPENDENCY
    assert (tmp_path / "results.json").exists()


def test_one_fault_after_the_other_is_one_shade_and_two_at_once_are_a_darker_one() -> None:
    spells = [
        Spell("a", "kill", 10, 20),
        Spell("b", "kill", 20, 40),
        Spell("c", "slow", 30, 50),
        Spell("d", "cut", 90, 99),
    ]
    shown = timeline(result([], end_s=60.0, spells=spells))
    assert plots.active(shown, spells, 1) == [(10, 40)]
    assert plots.active(shown, spells, 2) == [(30, 10)]
    assert plots.active(shown, spells, 3) == []


# How far it is from what could have been.


def test_a_phi_is_held_against_that_of_who_knows_the_run_seed_by_seed() -> None:
    found = phi_times(1.2)
    ratio = optimality.over_clairvoyant(found.runs, "full", 0)
    assert ratio is not None
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((1.2, 1.2, 1.2))
    assert ratio.count == len(SEEDS)
    assert optimality.over_clairvoyant([run for run in found.runs if run.policy == "full"], "full", 0) is None


def test_the_bound_has_a_row_and_no_policy_s_name() -> None:
    rows = optimality.grid(phi_times(1.2), phi_times(1.2).runs, 0).rows
    assert [row[0] for row in rows] == ["static", "greedy", "full", "clairvoyant", BOUND_ROW]
    assert [row[2:] for row in rows] == [
        ("2.00", "2.22"),
        ("2.00", "2.22"),
        ("1.20", "1.33"),
        ("1.00", "1.11"),
        ("0.900", "-"),
    ]


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.2, ""), (1.7, "more than 1.5"), (0.8, "candidates that are not all")],
)
def test_it_is_said_if_the_system_costs_too_much_more_than_who_knows_the_run(factor: float, said: str) -> None:
    found = phi_times(factor)
    told = [line for line in shortcomings(found, 0) if "clairvoyant does" in line]
    assert len(told) == bool(said)
    assert all(said in line for line in told)


def test_few_seeds_do_not_tell_how_far_it_is() -> None:
    found = phi_times(1.2)
    few = found.model_copy(update={"runs": tuple(run for run in found.runs if run.seed < 12)})
    assert any("2 seeds do not tell" in line for line in shortcomings(few, 0))

"""`resplit simulate`: a cluster in virtual time, under whoever decides."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.options import AsJson
from resplit.output import print_json
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from rich.console import Console

    from simulator.contest import Contest, R, S
    from simulator.scenario import Scenario

SEEDS_MAX = 10_000
DEFAULT_POLICIES = "static,full"


def simulate(
    scenario: Annotated[
        str | None, typer.Argument(help="A file, or the name of a scenario that comes with Resplit; none: list these.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Worlds to draw: 7, 1,2,5 or 10-39.")] = "10-12",
    policies: Annotated[
        str | None, typer.Option(help="Who decides, separated by commas; `all` for every one; default: static,full.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the report; default: simulated/SCENARIO.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one for each core.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run SCENARIO in virtual time, with the code that decides in production, and write a report.

    Will this model meet this SLO on these machines, and what if one dies? Copy `my-cluster` and say what you have.
    """
    from rich.console import Console  # noqa: PLC0415

    from simulator.files import read, shipped  # noqa: PLC0415
    from simulator.plots import require  # noqa: PLC0415
    from simulator.residency.scenario import ResidencyScenario  # noqa: PLC0415
    from simulator.tiers.scenario import TwoTierScenario  # noqa: PLC0415

    say = Console(stderr=as_json)
    known = shipped()
    if scenario is None:
        for name, path in known.items():
            say.print(f"[bold]{name}[/]  {read(path).title}")
        return
    path = known.get(scenario, Path(scenario))
    found = read(path)
    wanted = seeds_of(seeds)
    folder = report or Path("simulated") / found.name
    require()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--report {folder}: cannot be made: {error.strerror}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "report") from error
    asked = _Asked(policies, wanted, folder, jobs or os.cpu_count() or 1, as_json, say)
    if isinstance(found, TwoTierScenario):
        from simulator.tiers.results import CONTEST as TIERS  # noqa: PLC0415

        _contest(TIERS, found, asked)
    elif isinstance(found, ResidencyScenario):
        from simulator.residency.results import CONTEST as RESIDENCY  # noqa: PLC0415

        _contest(RESIDENCY, found, asked)
    else:
        _split(path, found, asked)


@dataclass(frozen=True)
class _Asked:
    """What is wanted of a scenario."""

    policies: str | None
    seeds: list[int]
    folder: Path
    jobs: int
    as_json: bool
    say: "Console"


def _split(path: Path, found: "Scenario", asked: _Asked) -> None:
    """One model over many nodes."""
    from simulator.policies import CONTENDERS, named  # noqa: PLC0415
    from simulator.report import headline, seed_grid, write  # noqa: PLC0415
    from simulator.runner import check_feasible, count  # noqa: PLC0415
    from simulator.runner import simulate as run  # noqa: PLC0415
    from simulator.shortcomings import shortcomings  # noqa: PLC0415
    from simulator.table import terminal  # noqa: PLC0415

    wanted = list(CONTENDERS) if asked.policies == "all" else (asked.policies or DEFAULT_POLICIES).split(",")
    names = [named(name.strip()).name for name in wanted]
    try:
        check_feasible(found, asked.seeds[0])
    except ResplitError as error:
        keys = "kinds.*.memory_bytes, sites.*.nodes, model and served say what there is and what it takes"
        raise ResplitError(error.code, f"{path}: {error.message}; {keys}", error.field) from error
    with progress(found.name, count(found, names, asked.seeds)) as done:
        results = run(found, names, asked.seeds, _command(), asked.jobs, lambda job, one: done())
    written = write(asked.folder, results)
    if asked.as_json:
        print_json(results)
        return
    for grid in headline(results, results.runs):
        asked.say.print(terminal(grid))
    if {results.reference, results.system} <= set(results.policies) and results.reference != results.system:
        asked.say.print(terminal(seed_grid(results, results.runs, reasons=False)))
    for sentence in shortcomings(results, asked.seeds[0]):
        asked.say.print(f"[yellow]{sentence}[/]")
    asked.say.print(f"[bold]{written[0]}[/]")


def _contest(contest: "Contest[S, R]", found: "S", asked: _Asked) -> None:
    """Services of two tiers, or many models."""
    from simulator.contest_report import grids, write  # noqa: PLC0415
    from simulator.table import terminal  # noqa: PLC0415

    wanted = list(contest.contenders) if asked.policies in (None, "all") else asked.policies.split(",")
    names = [contest.named(name.strip()) for name in wanted]
    with progress(found.name, len(contest.jobs(found, names, asked.seeds))) as done:
        results = contest.compare(found, names, asked.seeds, _command(), asked.jobs, done)
    written = write(contest, asked.folder, results)
    if asked.as_json:
        print_json(results)
        return
    aims, *loads = grids(contest, results)
    for each in (*loads, aims):
        asked.say.print(terminal(each))
    asked.say.print(f"[bold]{written[0]}[/]")


def _command() -> str:
    return shlex.join(["resplit", *sys.argv[1:]])


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar that goes on a step each time it is called."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)


def seeds_of(text: str) -> list[int]:
    """`7`, `1,2,5` or `10-39` as numbers; raises INVALID_REQUEST."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if not span or span.start < 0 or len(span) > SEEDS_MAX:
                raise ValueError(part)
            found.extend(span)
    except ValueError as error:
        message = f"--seeds {text!r}: give numbers from 0 on, as in 7, 1,2,5 or 10-39"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "seeds") from error
    return list(dict.fromkeys(found))

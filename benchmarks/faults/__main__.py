"""Faults on real processes under load, each with its promise.

    python -m benchmarks.faults [--runs N] [--only NAME ...] [--forget]

A cluster of three agents serves the adder in two stages; eight streams of 200 tokens follow one another, every second
one sampled with a seed, and each is compared with the uncut model. A fault comes at a random moment; what it broke is
started again and whole before the next run. *Resume* runs from the fault to the end of the longest wait for a token
after it, of the stream that waited last. *Lost* are requests that were accepted and did not end in exactly the right
tokens; those that were refused before are none of them. With few runs p99 is the worst.

Rows of faults that were not tried this time stay in `results/faults.json` as they were measured.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

from nats.aio.client import Client as Nats
from rich.console import Console
from rich.table import Table

from benchmarks.faults.load import INBOX, SILENCE_S, Load, Question, Wire, questions
from benchmarks.faults.measure import Run, quantile, summed_up
from benchmarks.faults.scenario import Scenario
from benchmarks.faults.scenarios import SCENARIOS
from benchmarks.faults.scene import Ear, Scene
from benchmarks.faults.surroundings import SkippedError, surrounded
from benchmarks.table import RESULTS, Row, write
from bus.identity import ORCHESTRATOR, load_credentials, load_identity
from models.store import Store
from natstls.patience import Backoff
from resplit.client import Client
from resplit.cluster import LocalCluster
from resplit.defaults import CONNECT_TIMEOUT_S
from resplit.demo import shipped_store
from resplit.exchange import open_connection
from schemas.errors import ResplitError

RUNS = 30
BEFORE_S = (0.2, 1.2)
"""All streams run for so long, about, before the fault."""
SOON = Backoff(0.1, 0.1)
TITLE = "faults under load: 8 streams of 200 tokens over two of three agents"

say = Console(width=200, highlight=False).print


async def measure(scenarios: list[Scenario], runs: int, seed: int, folder: Path) -> AsyncIterator[Row]:
    """A row for each scenario, as soon as it is done."""
    store = Store(Path(shutil.copytree(shipped_store(), folder / "store")))
    asked = await asyncio.to_thread(questions, store)
    for scenario in scenarios:
        found: list[Run] = []
        try:
            await tried(scenario, scenario.runs(runs), seed, folder, store, asked, found)
        except SkippedError as why:
            say(f"{scenario.name}: skipped, {why}")
            if not found:
                yield {**words(scenario), "runs": 0, "verdict": f"skipped: {why}"}
        except (TimeoutError, ResplitError) as error:
            # The others are still worth having, and this one is a miss, whoever is to blame.
            say(f"{scenario.name}: given up after {len(found)} runs, {error!r}")
            if not found:
                yield {**words(scenario), "runs": 0, "verdict": f"missed: given up, {type(error).__name__}: {error}"}
            else:
                found[-1] = found[-1].breaking([f"given up after {len(found)} runs: {type(error).__name__}: {error}"])
        if found:
            yield row(scenario, found)


async def tried(
    scenario: Scenario,
    runs: int,
    seed: int,
    folder: Path,
    store: Store,
    asked: tuple[Question, ...],
    found: list[Run],
) -> None:
    """So many runs, on as many clusters as that takes; adds each to `found` as soon as all is whole again."""
    draw = random.Random(f"{scenario.name} {seed}")
    per_cluster = scenario.runs_per_cluster or runs
    for first in range(0, runs, per_cluster):
        async with AsyncExitStack() as stack:
            there = folder / f"{scenario.name}-{first}"
            around = await stack.enter_async_context(surrounded(scenario.needs, there, store.root))
            cluster = around.cluster
            connection, replies = [
                await connected(cluster, keys) for keys in (cluster.operator_keys, cluster.client_keys)
            ]
            for one in (connection, replies):
                stack.push_async_callback(one.close)
            ear = Ear(load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR))
            await ear.listen(connection)
            for index in range(first, min(first + per_cluster, runs)):
                options = {"inbox_prefix": INBOX}
                keys = cluster.client_keys
                async with Client(cluster.url, keys=keys, idle_timeout_s=SILENCE_S, nats_options=options) as client:
                    wire = Wire()
                    listening = await wire.listen(replies)
                    scene = Scene(around, connection, ear, wire, Load(client, asked), draw, index)
                    if index == first:
                        await scene.place(None)
                        await scene.whole()
                        if scenario.prepare is not None:
                            await scenario.prepare(scene)
                            await scene.whole()
                    run = await once(scenario, scene)
                    await listening.unsubscribe()
                found.append(run)
                tell(scenario, run, f"{index + 1}/{runs}")
                await scene.whole()


async def connected(cluster: LocalCluster, keys: Path) -> Nats:
    """A connection of that member, which is back soon after the server is."""
    options = {**load_credentials(keys).nats_options, "backoff": SOON}
    return await open_connection(cluster.url, "resplit-bench", CONNECT_TIMEOUT_S, options)


def tell(scenario: Scenario, run: Run, number: str) -> None:
    """One run, in a line."""
    troubles = ", ".join((*run.lost, *run.broken)) or "nothing lost"
    told = "".join(f"; {name} {value:g}" for name, value in run.told.items())
    at_step = "" if run.step is None else f", {run.step}"
    say(
        f"{scenario.name} {number}{at_step}: {scenario.measures.removesuffix('_s')} "
        f"{getattr(run, scenario.measures):.3f} s, "
        f"gap {run.gap_s:.3f} s (median before {run.median_gap_s * 1e3:.1f} ms), up to {run.tokens} tokens before, "
        f"{run.requests} requests, {run.refused} refused, {run.repeated} repeated; {troubles}{told}"
    )


async def once(scenario: Scenario, scene: Scene) -> Run:
    """Do it once, under load, and tell what became of every request."""
    async with scene.load.running():
        await scene.load.flowing()
        await asyncio.sleep(scene.draw.uniform(*BEFORE_S))
        seen = await scenario.act(scene)
    run = summed_up(scene.load.asked, scene.wire.accepted, seen)
    return run.breaking(f"two tokens of one index: {said}" for said in scene.wire.conflicts)


async def published(scenarios: list[Scenario], runs: int, seed: int, folder: Path, keep: bool) -> list[Row]:
    """The rows, each of them on disk as soon as it is known if they are to be kept."""
    rows: list[Row] = []
    async for one in measure(scenarios, runs, seed, folder):
        rows.append(one)
        if keep:
            write("faults", TITLE, merged(rows), command="python -m benchmarks.faults", seed=seed)
    return rows


def words(scenario: Scenario) -> Row:
    """What a row says before anything is measured."""
    return {
        "name": scenario.name,
        "fault": scenario.fault,
        "promise": scenario.promise,
        "bound": scenario.bound,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def row(scenario: Scenario, runs: list[Run]) -> Row:
    """What was measured, and the verdict."""
    measured = [getattr(run, scenario.measures) for run in runs]
    excess = [over for run in runs if (over := scenario.holds(run)) is not None]
    broken = [how for run in runs for how in run.broken]
    lost = [how for run in runs for how in run.lost]
    return {
        **words(scenario),
        "runs": len(runs),
        "requests": sum(run.requests for run in runs),
        "lost": len(lost),
        "refused": sum(run.refused for run in runs),
        "measured": scenario.measures.removesuffix("_s"),
        "p50_s": round(quantile(measured, 0.5), 3),
        "p99_s": round(quantile(measured, 0.99), 3),
        "max_s": round(max(measured), 3),
        "gap_max_s": round(max(run.gap_s for run in runs), 3),
        "tokens_before": quantile([run.tokens for run in runs], 0.5),
        "median_gap_ms": round(quantile([run.median_gap_s for run in runs], 0.5) * 1e3, 1),
        "verdict": verdict(excess, lost, broken),
        "repeated": sum(run.repeated for run in runs),
        "load_average": round(os.getloadavg()[1], 1),
        "losses": sorted(set(lost)),
        "broken": sorted(set(broken)),
        "samples_s": [round(value, 4) for value in measured],
        **({"steps": [run.step for run in runs]} if any(run.step for run in runs) else {}),
        **({"told": [dict(run.told) for run in runs]} if any(run.told for run in runs) else {}),
    }


def verdict(excess: list[float], lost: list[str], broken: list[str]) -> str:
    """Met, or by how much and how often not. A bound is met if its 99th percentile is."""
    misses = []
    if lost:
        misses.append(f"{len(lost)} lost")
    if broken:
        misses.append(f"{len(broken)} broken")
    if excess and (over := quantile(excess, 0.99)) > 0:
        misses.append(f"late by {over:.2f} s, {sum(value > 0 for value in excess)} of {len(excess)} runs")
    if misses:
        return "missed: " + "; ".join(misses)
    return "met" if excess else "nothing lost"


def show(rows: list[Row]) -> None:
    table = Table(title=TITLE)
    for heading in ("fault", "promise", "bound", "runs", "lost", "p50 s", "p99 s", "max s", "worst gap s", "verdict"):
        table.add_column(heading, justify="right" if heading.endswith(" s") or heading in ("runs", "lost") else "left")
    for one in rows:
        figures = [one.get(key) for key in ("p50_s", "p99_s", "max_s", "gap_max_s")]
        lost = f"{one['lost']}/{one['requests']}" if "lost" in one else "-"
        shown = ["-" if figure is None else f"{figure:.2f}" for figure in figures]
        table.add_row(one["fault"], one["promise"], one["bound"], str(one["runs"]), lost, *shown, one["verdict"])
    say(table)


def merged(rows: list[Row]) -> list[Row]:
    """With the rows of faults that were not tried now, as they stand on disk."""
    path = RESULTS / "faults.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    by_name = {one["name"]: one for one in (*before, *rows)}
    return [by_name[scenario.name] for scenario in SCENARIOS if scenario.name in by_name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each fault ({RUNS})")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments and the victims")
    parser.add_argument("--forget", action="store_true", help="show what is measured, and keep nothing of it")
    parser.add_argument("--folder", type=Path, help="an empty folder for the clusters' logs, which is kept")
    given = parser.parse_args()
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in given.only]
    say(f"seed {given.seed}")
    gc.freeze()  # else a full collection here looks like a stream that waits
    with tempfile.TemporaryDirectory(prefix="resplit-faults-") as scratch:
        folder = given.folder or Path(scratch)
        rows = asyncio.run(published(scenarios, given.runs, given.seed, folder, not given.forget))
    show(rows)
    for one in rows:
        say(f"{one['name']}: {one['verdict']}")
    if any(one["verdict"].startswith("missed") for one in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

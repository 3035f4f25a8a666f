"""What orchestration and the journal take from decoding: `python -m benchmarks.overhead [--quick] [--folder DIR]`.

Sequences decode over two agents that share all cores. Shares are processor time over that of all cores while all of
the sequences decode: of the orchestrator, of nats-server (which keeps the journal and carries tokens to the client),
and of the journal in the ingress, which is taken from what `benchmarks.journal` measured per decode round. `rest` is
what a step takes beyond the time that the stages compute.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.resplit import DEPLOYMENT, TIMEOUT_S, placements
from benchmarks.table import RESULTS, Row, report
from benchmarks.watch import Stream
from bus.identity import ORCHESTRATOR
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait
from resplit.server import NATS
from schemas.control import DeployRequest
from schemas.deployment import Settings

NEW_TOKENS = {1: 100, 8: 100, 32: 100}
PROMPT_TOKENS = 8
TARGET = 0.02


async def measure(folder: Path, rounds: int) -> None:
    store, _, _ = bench_model(folder)
    cores = len(os.sched_getaffinity(0))
    journal = {row["sequences"]: row for row in _journal_rows()}
    rng = random.Random(0)
    prompt = [rng.randrange(2, 32000) for _ in range(PROMPT_TOKENS)]
    numbers = itertools.count()
    found: dict[int, list[Row]] = {n: [] for n in NEW_TOKENS}
    with tempfile.TemporaryDirectory() as temporary:
        async with (
            LocalCluster(Path(temporary) / "c", store.blobs_folder.parent, agents=2, threads=cores) as cluster,
            Client(cluster.url, keys=cluster.client_keys) as client,
        ):
            home = placements(len(store.manifest(store.resolve(NAME)).blocks))["home"]
            settings = Settings(context_tokens=2048, max_sequences=max(NEW_TOKENS))
            request = DeployRequest(model=NAME, name=DEPLOYMENT, placement=home, settings=settings)
            await deploy_and_wait(cluster.operator, request, TIMEOUT_S)
            for _, n in itertools.product(range(rounds), NEW_TOKENS):
                streams = [Stream(prompt, NEW_TOKENS[n], f"bench-{next(numbers)}") for _ in range(n)]
                found[n].append(await one(cluster, client, streams, cores, journal[n]))
                print(found[n][-1], flush=True)
    rows = [
        {"name": "decode", **{key: round(statistics.median(row[key] for row in group), 5) for key in group[0]}}
        for group in found.values()
    ]
    title = f"what orchestration and the journal take, {PARAMETERS // 10**6} M parameters, int4, 2 agents"
    report("overhead", title, rows, rounds=rounds, load_average=os.getloadavg())


def _journal_rows() -> list[Row]:
    path = RESULTS / "journal.json"
    if not path.exists():
        raise SystemExit("run `python -m benchmarks.journal` first")
    rows: list[Row] = json.loads(path.read_text())["rows"]
    return [row for row in rows if row["name"] == "sync default"]


async def one(cluster: LocalCluster, client: Client, streams: list[Stream], cores: int, journal: Row) -> Row:
    """All streams once; figures of the time in which all of them decode."""
    processes = {name: psutil.Process(pid) for name, pid in cluster.processes.items()}
    running = asyncio.gather(*(stream.run(client, NAME) for stream in streams))
    await asyncio.gather(*(stream.reached(1) for stream in streams))
    began, before = time.time(), {name: _spent_s(process) for name, process in processes.items()}
    await streams[0].reached(streams[0].tokens_wanted)  # it was the first to begin
    ended, after = time.time(), {name: _spent_s(process) for name, process in processes.items()}
    await running
    count = sum(began < t <= ended for stream in streams for t in stream.times)
    steps = count / len(streams)
    wall_s = ended - began
    last = streams[-1]
    assert last.usage is not None, last.error
    compute_ms = sum(stage.compute_ms for stage in last.usage.stages) / last.tokens_wanted
    share = {name: (after[name] - before[name]) / (wall_s * cores) for name in processes}
    journal_share = journal["client_cpu_us"] / 1e6 * steps / (wall_s * cores)
    return {
        "sequences": len(streams),
        "tokens_per_s": count / wall_s,
        "step_ms": 1e3 * wall_s / steps,
        "compute_ms": compute_ms,
        "rest_share": max(0.0, 1 - compute_ms / (1e3 * wall_s / steps)),
        "orchestrator_share": share[ORCHESTRATOR],
        "nats_share": share[NATS],
        "journal_share": journal_share,
        "together_share": share[ORCHESTRATOR] + share[NATS] + journal_share,
    }


def _spent_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="one round instead of three")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.folder, 1 if arguments.quick else 3))


if __name__ == "__main__":
    main()

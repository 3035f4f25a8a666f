"""The simulator against real processes on the same small workload: `python -m benchmarks.validation [--quick]`.

Two agents, a core each, run a decoder in two stages while requests of one class arrive at random. Then the same
arrivals come to a simulated cluster whose machines are as fast as those agents said in their heartbeats of the run, on
average: what they measured is all that the simulator is told. Compared are the medians and the 95th percentiles of what
clients met.
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nats.aio.client import Client as Nats

from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.table import Row, report
from models.store import Store
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait, status_on
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import BlockTime, Capacity
from schemas.control import DeployRequest
from schemas.deployment import Settings, Stage
from schemas.manifest import Manifest
from simulator.model import FRAME_S, Physics
from simulator.policies import CONTENDERS
from simulator.records import Outcome
from simulator.scenario import (
    LinkSpec,
    ModelSpec,
    NetworkSpec,
    NodeSpec,
    RequestClass,
    Scenario,
    Served,
    SiteSpec,
    Telemetry,
    Workload,
)
from simulator.traces import TraceRow
from simulator.world import World

SETTINGS = Settings(context_tokens=512, max_sequences=16)
PROMPT_TOKENS, OUTPUT_TOKENS = 48, 32
HEARTBEAT_S = 1.2
WARMUP_S = 30.0
TARGETS = {"p50": 0.10, "p95": 0.20}
SITE = "n"
MEASURED = ("decode_ms", "decode_ms_per_row", "decode_ms_per_context_token", "prefill_ms", "prefill_ms_per_token")


@dataclass(frozen=True)
class Met:
    """What one client met, in milliseconds."""

    ttft_ms: float
    tpot_ms: float
    total_ms: float


def arrivals(count: int, rate_per_s: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    at, found = 0.0, []
    for _ in range(count):
        at += draw.expovariate(rate_per_s)
        found.append(at)
    return found


async def real(client: Client, times: Sequence[float], seed: int) -> list[Met]:
    """Requests at these times, from now on."""
    draw, began = random.Random(seed), time.monotonic()

    async def one(at: float) -> Met:
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        prompt = [draw.randrange(2, 32000) for _ in range(PROMPT_TOKENS)]
        asked, seen = time.monotonic(), list[float]()
        async for _ in client.stream(NAME, token_ids=prompt, max_tokens=OUTPUT_TOKENS, ignore_eos=True):
            seen.append(time.monotonic())
        return _met(asked, seen[0], seen[-1], len(seen))

    return await asyncio.gather(*(one(at) for at in times))


async def heartbeats(operator: Nats, into: dict[NodeId, list[Capacity]]) -> None:
    """The capacities in every heartbeat of a node that runs something, until this is cancelled."""
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        for one in (await status_on(operator)).nodes:
            if one.capacity.slowdown is not None:
                into.setdefault(NodeId(one.capacity.node), []).append(one.capacity)


def average(seen: Sequence[Capacity]) -> Capacity:
    """One node's last capacity, with the block times of all of them on average: each tells of its last seconds."""
    by_block: dict[tuple[Digest, int], list[BlockTime]] = {}
    for capacity in seen:
        for time_ in capacity.block_times:
            by_block.setdefault((time_.model, time_.block), []).append(time_)
    last = seen[-1]
    return last.model_copy(
        update={"block_times": tuple(_average(by_block[t.model, t.block]) for t in last.block_times)}
    )


def _average(times: Sequence[BlockTime]) -> BlockTime:
    means = {name: statistics.mean(getattr(one, name) or 0.0 for one in times) for name in MEASURED}
    return times[-1].model_copy(update=means)


def simulated(
    times: Sequence[float], manifest: Manifest, digest: Digest, seen: Mapping[NodeId, Capacity], cut: int
) -> list[Met]:
    """The same requests in a world of the machines that were measured."""
    by_node = {
        name: {one.block: one for one in capacity.block_times if one.model == digest} for name, capacity in seen.items()
    }
    names = {NodeId(f"{SITE}-{i}"): NodeId(f"n{i}") for i in range(len(seen))}

    def time_of(node: NodeId, _: NodeSpec, block: int) -> BlockTime:
        own = by_node[names[node]]
        return own.get(block) or next(iter(own.values())).model_copy(update={"block": block})

    frames = [capacity.frame_ms for capacity in seen.values() if capacity.frame_ms is not None]
    physics = Physics(manifest, digest, time_of, statistics.mean(frames) / 1e3 if frames else FRAME_S)
    rtts = [link.rtt_ms for capacity in seen.values() for link in capacity.links]
    scenario = _scenario(manifest, statistics.mean(rtts) if rtts else 0.5, times[-1])
    trace = [TraceRow(at, PROMPT_TOKENS, OUTPUT_TOKENS) for at in times]
    last = len(manifest.blocks) - 1
    placement = (
        Stage(node=NodeId(f"{SITE}-0"), first=0, last=cut - 1),
        Stage(node=NodeId(f"{SITE}-1"), first=cut, last=last),
    )
    world = World(scenario, CONTENDERS["static-restart"], 0, trace, physics=physics, placement=placement)
    return [_of(outcome) for outcome in world.run().outcomes]


def _of(outcome: Outcome) -> Met:
    if outcome.first_s is None or outcome.last_s is None:
        raise RuntimeError(f"a simulated request ended in {outcome.error}")
    return _met(outcome.arrival.at_s, outcome.first_s, outcome.last_s, outcome.tokens)


def _met(asked: float, first: float, last: float, tokens: int) -> Met:
    return Met(1e3 * (first - asked), 1e3 * (last - first) / max(1, tokens - 1), 1e3 * (last - asked))


def _scenario(manifest: Manifest, rtt_ms: float, last_s: float) -> Scenario:
    link = LinkSpec(rtt_ms=rtt_ms, mbit_per_s=10_000.0, jitter=0.0)
    model = ModelSpec(
        name="measured", layers=len(manifest.blocks) - 2, hidden=1, layer_bytes=1, ends_bytes=1, layer_flops=1,
        head_flops=1, layer_kv_bytes=0, context_tokens=SETTINGS.context_tokens,
    )  # fmt: skip
    return Scenario(
        name="validation",
        title="as measured",
        duration_s=WARMUP_S + last_s + 1.0,
        warmup_s=WARMUP_S,
        model=model,
        served=Served(settings=SETTINGS),
        kinds={"box": NodeSpec(flops_per_s=1e12, bytes_per_s=1e11, memory_bytes=1 << 40, disk_bytes_per_s=1e10)},
        sites=(SiteSpec(name=SITE, nodes=2, node="box"),),
        network=NetworkSpec(within=link, between=link, cloud=link),
        workload=Workload(
            process="trace",
            trace="in memory",
            classes=(RequestClass(name="chat", share=1, prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS),),
        ),
        telemetry=Telemetry(noise=0.0),
    )


def compared(name: str, rate: float, there: Sequence[Met], here: Sequence[Met]) -> list[Row]:
    """A row for each figure: real, simulated, and how far apart."""
    rows: list[Row] = []
    for figure in ("ttft_ms", "tpot_ms", "total_ms"):
        row: Row = {"name": name, "rate_per_s": rate, "figure": figure, "requests": len(there)}
        for share, label in ((50, "p50"), (95, "p95")):
            measured = float(np.percentile([getattr(one, figure) for one in there], share))
            reckoned = float(np.percentile([getattr(one, figure) for one in here], share))
            row |= {
                f"{label}_real": round(measured, 1),
                f"{label}_simulated": round(reckoned, 1),
                f"{label}_error": round(reckoned / measured - 1, 3),
                f"{label}_met": abs(reckoned / measured - 1) <= TARGETS[label],
            }
        rows.append(row)
    return rows


async def measure(folder: Path, quick: bool) -> None:
    store, digest, _ = bench_model(folder)
    root = store.blobs_folder.parent
    manifest = Store(root).manifest(digest)
    cores = sorted(os.sched_getaffinity(0))
    cut = len(manifest.blocks) // 2
    stages = (
        Stage(node=NodeId("n0"), first=0, last=cut - 1),
        Stage(node=NodeId("n1"), first=cut, last=len(manifest.blocks) - 1),
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        pinned = [cores[:1], cores[1:2]]
        async with (
            LocalCluster(Path(temporary), root, 2, threads=1, cores=pinned) as cluster,
            Client(cluster.url, keys=cluster.client_keys) as client,
        ):
            operator = await cluster.operator.connect("validation", "operator")
            request = DeployRequest(model=NAME, name=DeploymentName(NAME), placement=stages, settings=SETTINGS)
            await deploy_and_wait(cluster.operator, request, 300.0)
            await real(
                client, arrivals(6, 0.5, 1), 1
            )  # caches and kernels are warm, and its times are those of running
            for rate, count in ((0.15, 20), (0.4, 40)) if not quick else ((0.3, 10),):
                times = arrivals(count, rate, 7)
                said: dict[NodeId, list[Capacity]] = {}
                listening = asyncio.create_task(heartbeats(operator, said))
                there = await real(client, times, 7)
                listening.cancel()
                seen = {node: average(capacities) for node, capacities in said.items()}
                here = simulated(times, manifest, digest, seen, cut)
                found = compared(f"{rate:g} requests/s", rate, there, here)
                for row in found:
                    print(row, flush=True)
                rows += found
            await operator.close()
    title = f"simulator against real processes, {PARAMETERS // 10**6} M parameters, int4, two agents with a core each"
    report("validation", title, rows, load_average=os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="one rate, ten requests")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.folder, arguments.quick))


if __name__ == "__main__":
    main()

"""What was predicted before a run against what the run then showed: `python -m benchmarks.prediction [--quick]`.

Agents run the model over several cuts, each under several loads. Before each run the cost model is asked with what the
heartbeats say at that moment, as the orchestrator is; then requests run beside others that decode, and what they met
is compared. Three predictions are told apart: of a cut that never ran (`new`), of a load right before it (`before`,
which the target is about), and in hindsight, right after it (`after`): its times are
of that very run, so that it tests the form of the model alone, and what it explains is a machine that changed.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.model import NAME, PARAMETERS, bench_model
from benchmarks.table import Row, report
from models.store import Store
from orchestrator.beliefs import believed
from profiler.compute import times_of
from profiler.cost import Estimate, predict
from profiler.objective import Demand
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait, place_and_wait, status_on
from resplit.replies import Usage
from schemas.base import DeploymentName, Digest, NodeId
from schemas.control import DeployRequest, StatusReply
from schemas.deployment import Settings, Stage
from schemas.manifest import Manifest
from schemas.plan import Route

DEPLOYMENT = DeploymentName(NAME)
SETTINGS = Settings(context_tokens=1024, max_sequences=64)
"""Slots of 64, of 256 and of 1,024 tokens: 64, 16 and 4 of them."""
NEW_TOKENS = 40
BESIDE_PROMPT_TOKENS, BESIDE_TOKENS = 32, 220
"""Of the sequences that decode beside the one that is measured; they are ended with it. Slots of one length hold them
all, as sequences of two lengths are two calls."""
HEARTBEAT_S = 1.2
"""Until a heartbeat says what the last run showed."""
TIMEOUT_S = 180.0
TPOT_TARGET, TTFT_TARGET = 0.10, 0.15
Placement = tuple[Stage, ...]


@dataclass(frozen=True)
class Load:
    """Sequences at once, the measured one included, and the prompt of that one."""

    sequences: int
    prompt_tokens: int


LOADS = (Load(1, 32), Load(1, 128), Load(4, 32), Load(8, 32), Load(4, 128), Load(1, 512))
LOADS_QUICK = (Load(1, 32), Load(4, 32), Load(1, 128))


@dataclass(frozen=True)
class Measured:
    """What one request met, in milliseconds."""

    ttft_ms: float
    tpot_ms: float
    overhead_ms: float
    """Of a frame, on the whole way around: neither computed nor waiting for a compute thread."""


@dataclass(frozen=True)
class Scene:
    """A cluster with the model deployed, and what is needed to predict for it."""

    cluster: LocalCluster
    client: Client
    manifest: Manifest
    digest: Digest
    rng: random.Random

    async def status(self) -> StatusReply:
        connection = await self.cluster.operator.connect("resplit-bench", "operator")
        try:
            return await status_on(connection, 5.0)
        finally:
            await connection.close()

    async def predicted(self, placement: Placement, load: Load) -> Estimate:
        """From what the nodes say now."""
        capacities = {NodeId(node.capacity.node): node.capacity for node in (await self.status()).nodes}
        times = {name: times_of(one.block_times) for name, one in capacities.items()}
        seen = believed(capacities, times, self.manifest, self.digest, 1.0)
        route = Route(index=0, source=placement[0].node, stages=placement, max_sequences=SETTINGS.max_sequences)
        demand = Demand(output_tokens=NEW_TOKENS, batch=load.sequences)
        return predict(route, seen, self.manifest, load.prompt_tokens, demand=demand, settings=SETTINGS)

    async def measured(self, load: Load, rounds: int) -> list[Measured]:
        """Requests one after the other beside as many others as the load has."""
        async with self._beside(load.sequences - 1):
            return [await self._request(load.prompt_tokens) for _ in range(rounds)]

    def prompt(self, tokens: int) -> list[int]:
        """Never the same twice: what was kept of an earlier one would shorten it."""
        return [self.rng.randrange(2, 32000) for _ in range(tokens)]

    async def _request(self, prompt_tokens: int) -> Measured:
        usage: Usage | None = None
        prompt = self.prompt(prompt_tokens)
        async for token in self.client.stream(NAME, token_ids=prompt, max_tokens=NEW_TOKENS, ignore_eos=True):
            usage = token.usage or usage
        if usage is None or usage.ttft_ms is None or usage.tpot_ms is None:
            raise RuntimeError("a request ended without its times")
        return Measured(usage.ttft_ms, usage.tpot_ms, usage.network_ms / usage.stages[0].calls)

    @contextlib.asynccontextmanager
    async def _beside(self, count: int) -> AsyncIterator[None]:
        under_way = [asyncio.Event() for _ in range(count)]

        async def stream(begun: asyncio.Event) -> None:
            prompt, fields = self.prompt(BESIDE_PROMPT_TOKENS), {"max_tokens": BESIDE_TOKENS, "ignore_eos": True}
            tokens = self.client.stream(NAME, None, token_ids=prompt, **fields)  # type: ignore[arg-type]
            try:
                async with contextlib.aclosing(tokens):
                    async for token in tokens:
                        if token.index:
                            begun.set()
            finally:
                begun.set()  # an error is found below

        others = [asyncio.create_task(stream(begun)) for begun in under_way]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.gather(*(begun.wait() for begun in under_way))
            yield
            if ended := [other for other in others if other.done()]:
                ended[0].result()
                raise RuntimeError("sequences beside the measured ones ended too early: BESIDE_TOKENS are too few")
        finally:
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)


def placements(blocks: int) -> dict[str, Placement]:
    """Cuts over nodes that share all cores."""
    last = blocks - 1

    def cut(*firsts: int) -> Placement:
        ends = [*(first - 1 for first in firsts[1:]), last]
        return tuple(
            Stage(node=NodeId(f"n{k}"), first=a, last=b) for k, (a, b) in enumerate(zip(firsts, ends, strict=True))
        )

    return {
        "2 stages, even": cut(0, blocks // 2),
        "2 stages, a quarter first": cut(0, blocks // 4),
        "3 stages": cut(0, blocks // 3, 2 * blocks // 3),
        "1 stage": cut(0),
    }


async def measure_cut(scene: Scene, name: str, placement: Placement, loads: Sequence[Load], rounds: int) -> list[Row]:
    """One row for each load."""
    new = {load: await scene.predicted(placement, load) for load in loads}
    rows = []
    for load in loads:
        await asyncio.sleep(HEARTBEAT_S)
        before = await scene.predicted(placement, load)
        began = time.monotonic()
        found = await scene.measured(load, rounds)
        await asyncio.sleep(HEARTBEAT_S)
        after = await scene.predicted(placement, load)
        row: Row = {"name": name, "sequences": load.sequences, "prompt": load.prompt_tokens}
        for figure in ("tpot", "ttft"):
            values = [getattr(one, f"{figure}_ms") for one in found]
            middle = statistics.median(values)
            row[f"{figure}_measured_ms"] = round(middle, 1)
            row[f"{figure}_ms"] = round(getattr(before, f"{figure}_ms"), 1)
            for when, estimate in (("new", new[load]), ("before", before), ("after", after)):
                row[f"{figure}_error_{when}"] = round(getattr(estimate, f"{figure}_ms") / middle - 1, 3)
            row[f"{figure}_spread"] = round((max(values) - min(values)) / middle, 3)
        row["overhead_measured_ms"] = round(statistics.median(one.overhead_ms for one in found), 2)
        row["overhead_ms"] = round(before.terms["network_ms"] + before.terms["frame_ms"], 2)
        row["seconds"] = round(time.monotonic() - began, 1)
        row["load_average"] = round(os.getloadavg()[0], 1)
        print(row, flush=True)
        rows.append(row)
    return rows


@contextlib.asynccontextmanager
async def deployed(folder: Path, store_folder: Path, placement: Placement, **cluster: Any) -> AsyncIterator[Scene]:
    """A cluster in which the model runs over `placement`, and has run."""
    store = Store(store_folder)
    digest = store.resolve(NAME)
    async with (
        LocalCluster(folder, store_folder, **cluster) as running,
        Client(running.url, keys=running.client_keys) as client,
    ):
        request = DeployRequest(model=NAME, name=DEPLOYMENT, placement=placement, settings=SETTINGS)
        await deploy_and_wait(running.operator, request, TIMEOUT_S)
        scene = Scene(running, client, store.manifest(digest), digest, random.Random(0))
        await asyncio.sleep(HEARTBEAT_S)
        yield scene


async def measure(folder: Path, quick: bool) -> None:
    store, digest, _ = bench_model(folder)
    root = store.blobs_folder.parent
    blocks = len(store.manifest(digest).blocks)
    cuts = placements(blocks)
    loads, rounds = (LOADS_QUICK, 1) if quick else (LOADS, 2)
    cores = sorted(os.sched_getaffinity(0))
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            first = next(iter(cuts.values()))
            async with deployed(Path(temporary) / "shared", root, first, agents=3, threads=len(cores)) as scene:
                for name, placement in cuts.items():
                    if placement != first:
                        await place_and_wait(scene.cluster.operator, DEPLOYMENT, placement, TIMEOUT_S)
                        await asyncio.sleep(HEARTBEAT_S)
                    rows += await measure_cut(scene, name, placement, loads, rounds)
            if len(cores) >= 2:
                pinned = [cores[:1], cores[1:2]]
                even = cuts["2 stages, even"]
                async with deployed(Path(temporary) / "pinned", root, even, agents=2, threads=1, cores=pinned) as scene:
                    rows += await measure_cut(scene, "2 stages, a core each", even, loads[:3], rounds)
    finally:  # also of a run that was interrupted
        title = f"predicted and measured, {PARAMETERS // 10**6} M parameters, int4"
        report("prediction", title, [*rows, *summary(rows)], load_average=os.getloadavg())


def summary(rows: Sequence[Row]) -> list[Row]:
    """The medians of |error| over all rows, and the worst."""
    found = []
    for figure, target in (("tpot", TPOT_TARGET), ("ttft", TTFT_TARGET)):
        if rows:
            row: Row = {"name": f"{figure}, median of |error|", "figure": figure, "target": target}
            for when in ("new", "before", "after"):
                errors = [abs(one[f"{figure}_error_{when}"]) for one in rows]
                row[f"{figure}_error_{when}"] = round(statistics.median(errors), 3)
                row[f"worst_{when}"] = round(max(errors), 3)
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/bench").expanduser())
    parser.add_argument("--quick", action="store_true", help="three loads on every cut, one request each")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.folder, arguments.quick))


if __name__ == "__main__":
    main()

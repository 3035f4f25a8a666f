"""What is done ahead of need: what it costs those who run, and what it saves: `python -m benchmarks.ahead`.

*Loading beside*: one agent decodes a sequence of one model, while two others that do not fit beside each other are
loaded in turns, one every ten seconds, three times as often as anything is loaded ahead of need; against the same with
nothing loaded, in turns, with all cores of the machine and with the agent kept to one of them. *Failover*: the node
that serves a model is killed while it decodes; how long the sequence stands still where the other node has the model's
files on its disk, and where it has not and the registry is behind a wire of 100 Mbit/s, or none.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.faults.wires import MACHINE, Wires, why_not
from benchmarks.residency import BARE_BYTES, SETTINGS, models
from benchmarks.table import Row, report
from models.store import Store
from profiler.memory import memory_bytes
from resplit import Client, control
from resplit.cluster import LocalCluster
from schemas.base import DeploymentName, NodeId
from schemas.control import DeployRequest, StatusReply

EVERY_S = 10.0
"""A third of `orchestrator.residents.AHEAD_REST`."""
PHASE_S = 30.0
TOKENS = 200
WIRE_BYTES_PER_S = 12_500_000
NODES = (NodeId("n0"), NodeId("n1"))


async def deploy(cluster: LocalCluster, name: str, *, on_demand: bool) -> None:
    request = DeployRequest(name=DeploymentName(name), model=name, settings=SETTINGS, on_demand=on_demand)
    await control.deploy_and_wait(cluster.operator, request, 300.0)


async def seen(cluster: LocalCluster, true: Callable[[StatusReply], bool]) -> StatusReply:
    async with asyncio.timeout(120):
        while not true(found := await control.status(cluster.operator)):  # noqa: ASYNC110 (it is asked over the bus)
            await asyncio.sleep(0.2)
    return found


async def decoding(client: Client, until: float) -> list[float]:
    """Milliseconds between tokens, of one stream after the other."""
    gaps: list[float] = []
    while time.monotonic() < until:
        last: float | None = None
        async for _ in client.stream("m0", "the quick", max_tokens=TOKENS, ignore_eos=True):
            now = time.monotonic()
            if last is not None:
                gaps.append(1e3 * (now - last))
            last = now
    return gaps


async def beside(store: Store, rounds: int, cores: list[list[int]] | None) -> list[Row]:
    """Nothing loaded and something loaded every ten seconds, in turns."""
    where = "all cores" if cores is None else "one core"
    need = sum(memory_bytes(block, SETTINGS) for block in store.manifest("m0").blocks)
    found: dict[str, list[float]] = {"nothing is loaded": [], "a model is loaded every 10 s": []}
    loads = 0
    with tempfile.TemporaryDirectory() as folder:
        memory = BARE_BYTES + round(2.4 * need)
        async with (
            LocalCluster(Path(folder), store.root, 1, threads=1, memory_bytes=memory, cores=cores) as cluster,
            Client(cluster.url, keys=cluster.client_keys, idle_timeout_s=120.0) as client,
        ):
            await deploy(cluster, "m0", on_demand=False)
            for name in ("m1", "m2"):
                await deploy(cluster, name, on_demand=True)
            for name in ("m1", "m2", "m1"):  # every disk has them, every kernel was probed
                await client.complete(name, "the quick", max_tokens=1)
            turns = itertools.cycle(("m2", "m1"))

            async def load(until: float) -> None:
                nonlocal loads
                while time.monotonic() + 2.0 < until:
                    await client.complete(next(turns), "the quick", max_tokens=1)
                    loads += 1
                    await asyncio.sleep(EVERY_S)

            async def nothing(until: float) -> None:
                await asyncio.sleep(until - time.monotonic())

            work: dict[str, Callable[[float], Awaitable[None]]] = dict(zip(found, (nothing, load), strict=True))
            for turn, name in itertools.product(range(rounds), found):
                until = time.monotonic() + PHASE_S
                gaps, _ = await asyncio.gather(decoding(client, until), work[name](until))
                found[name] += gaps
                print(turn, name, round(statistics.mean(gaps), 3), flush=True)
    base = statistics.mean(found["nothing is loaded"])
    return [
        {
            "name": f"{name}, {where}",
            "tokens": len(gaps),
            "ms a token": round(statistics.mean(gaps), 3),
            "of undisturbed": round(statistics.mean(gaps) / base, 4),
            "p99 ms": round(statistics.quantiles(gaps, n=100)[98], 2),
            "longest ms": round(max(gaps), 1),
            "loads": loads if name != "nothing is loaded" else 0,
        }
        for name, gaps in found.items()
    ]


async def failover(store: Store, folder: Path, *, staged: bool, slow: bool) -> float:
    """Seconds for which a sequence stands still whose only node is killed."""
    async with AsyncExitStack() as stack:
        wires = await stack.enter_async_context(Wires(folder, NODES))
        cluster = await stack.enter_async_context(
            LocalCluster(folder, store.root, 2, threads=1, host=wires.host, places=wires.places)
        )
        client = await stack.enter_async_context(Client(cluster.url, keys=cluster.client_keys, idle_timeout_s=120.0))
        await deploy(cluster, "m0", on_demand=False)
        status = await control.status(cluster.operator)
        current = status.deployments[0].current
        assert current is not None and len(current.nodes) == 1, "it fits on one node"
        used = NodeId(current.nodes[0])
        other = next(node for node in NODES if node != used)
        model, blocks = current.model, current.block_count

        def has_all(found: StatusReply) -> bool:
            disks = {node.capacity.node: node.capacity.on_disk for node in found.nodes}
            return any(one.model == model and len(one.blocks) == blocks for one in disks[other])

        await seen(cluster, has_all)
        if not staged:
            for ref in {ref.digest for block in store.manifest(model).blocks for ref in block.files}:
                Store(cluster.folder / other / "store").path(ref).unlink(missing_ok=True)
        if slow:
            await wires.slow(MACHINE, other, WIRE_BYTES_PER_S)
        longest = last = 0.0
        number = 0
        async for _ in client.stream("m0", "the quick", max_tokens=TOKENS, ignore_eos=True):
            now = time.monotonic()
            longest, last, number = max(longest, now - last if last else 0.0), now, number + 1
            if number == 20:
                await cluster.kill(used)
        return longest


async def failovers(store: Store, runs: int) -> list[Row]:
    cases = {
        "on the other node's disk": (True, False),
        "on the other node's disk, a wire of 100 Mbit/s": (True, True),
        "in the registry": (False, False),
        "in the registry, a wire of 100 Mbit/s": (False, True),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for run, (name, (staged, slow)) in itertools.product(range(runs), cases.items()):
        with tempfile.TemporaryDirectory() as folder:
            found[name].append(await failover(store, Path(folder), staged=staged, slow=slow))
        print(run, name, round(found[name][-1], 2), flush=True)
    return [
        {"name": name, "runs": runs, "p50 s": round(statistics.median(each), 2), "worst s": round(max(each), 2)}
        for name, each in found.items()
    ]


async def measure(store: Store, rounds: int, runs: int) -> list[Row]:
    rows = [*await beside(store, rounds, None), *await beside(store, rounds, [[0]])]
    if reason := why_not():
        print(f"no failover: {reason}")
        return rows
    return [*rows, *await failovers(store, runs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/resplit/residency").expanduser())
    parser.add_argument("--rounds", type=int, default=4, help="of half a minute without loads and half with")
    parser.add_argument("--runs", type=int, default=5, help="failovers of each kind")
    arguments = parser.parse_args()
    store = models(arguments.folder)
    rows = asyncio.run(measure(store, arguments.rounds, arguments.runs))
    size = round(sum(block.session_bytes for block in store.manifest("m0").blocks) / 1e6)
    report("ahead", f"A decoder of {size} MB, one thread an agent", rows, load_average=os.getloadavg())


if __name__ == "__main__":
    main()

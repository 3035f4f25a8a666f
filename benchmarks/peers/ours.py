"""Resplit itself: a client, NATS and agents, as its users run it."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from functools import partial
from pathlib import Path

from benchmarks.model import Precision, bench_model
from benchmarks.peers.contender import Contender, FailedError, Layout, Mend
from models.store import Store
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait, status
from resplit.replies import RequestError
from schemas.base import DeploymentName, NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings, Stage
from schemas.errors import ResplitError

SETTINGS = Settings(context_tokens=2048, max_sequences=1)
"""One sequence at a time, as the others have it."""
NAME = DeploymentName("bench")
TIMEOUT_S = 120.0


@contextlib.asynccontextmanager
async def resplit(
    folder: Path, precision: Precision, scratch: Path, layouts: Collection[Layout]
) -> AsyncIterator[list[Contender]]:
    """Three agents with one thread each: two have half the blocks each, the third has all, as far as asked for."""
    store, digest, _ = bench_model(folder, precision)
    last = len(store.manifest(digest).blocks) - 1
    nodes = [NodeId(f"n{i}") for i in range(3)]
    halves = (Stage(node=nodes[0], first=0, last=last // 2), Stage(node=nodes[1], first=last // 2 + 1, last=last))
    whole = (Stage(node=nodes[2], first=0, last=last),)
    async with _cluster(store, scratch) as (cluster, client):
        for name, placement in (("whole", whole), ("split", halves)):
            if name not in layouts:
                continue
            wanted = DeployRequest(name=DeploymentName(name), model=digest, placement=placement, settings=SETTINGS)
            await deploy_and_wait(cluster.operator, wanted, TIMEOUT_S)

        async def one() -> list[int]:
            return [cluster.processes[nodes[2]]]

        async def two() -> list[int]:
            return [cluster.processes[node] for node in nodes[:2]]

        others = partial(_others, cluster)
        both = [
            Contender("Resplit, one agent", "resplit", "whole", partial(_stream, client, "whole"), one, others),
            Contender("Resplit, two agents", "resplit", "split", partial(_stream, client, "split"), two, others),
        ]
        yield [contender for contender in both if contender.layout in layouts]


@contextlib.asynccontextmanager
async def planned(folder: Path, precision: Precision, scratch: Path) -> AsyncIterator[list[Contender]]:
    """Two stages wherever the planner wants them among three agents."""
    store, digest, _ = bench_model(folder, precision)
    wanted = DeployRequest(name=NAME, model=digest, stages=2, settings=SETTINGS)
    async with _cluster(store, scratch) as (cluster, client):
        await deploy_and_wait(cluster.operator, wanted, TIMEOUT_S)

        async def stages() -> list[int]:
            [found] = (await status(cluster.operator)).deployments
            assert found.current is not None, "it serves"
            return [cluster.processes[stage.node] for stage in found.current.routes[0].stages]

        async def again() -> None:
            for node in cluster.agents:
                if node not in cluster.processes:
                    await cluster.start(node)
            await deploy_and_wait(cluster.operator, wanted, TIMEOUT_S)

        yield [
            Contender(
                "Resplit, two of three agents",
                "resplit",
                "split",
                partial(_stream, client, NAME),
                stages,
                partial(_others, cluster),
                mends=(Mend("its agent started again", again),),
            )
        ]


@contextlib.asynccontextmanager
async def _cluster(store: Store, scratch: Path) -> AsyncIterator[tuple[LocalCluster, Client]]:
    async with (
        LocalCluster(scratch / "resplit", store.root, agents=3, threads=1) as cluster,
        Client(cluster.url, keys=cluster.client_keys) as client,
    ):
        yield cluster, client


def _others(cluster: LocalCluster) -> list[int]:
    return [pid for name, pid in cluster.processes.items() if name not in cluster.agents]


async def _stream(client: Client, name: str, prompt: Sequence[int], new_tokens: int) -> AsyncGenerator[int, None]:
    try:
        asked = client.stream(name, token_ids=prompt, max_tokens=new_tokens, ignore_eos=True)
        async with contextlib.aclosing(asked) as tokens:
            async for token in tokens:
                yield token.token_id
    except (RequestError, ResplitError) as error:
        raise FailedError(str(error)) from error

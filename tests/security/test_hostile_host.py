"""An agent at the edge that keeps no rule, in the middle of a private cut: what others give it all the same."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.shell import run
from agent.stages import Stages
from benchmarks.faults.owned import OwnedCluster
from bus.stopping import end
from resplit import Client, control
from schemas.audit import AuditKind
from schemas.frame import Activation, Cache, Fetch, Frame, Result, Token
from schemas.section import SeenPlan
from tests.security.recording import ADDER, DEPLOYED, N0, N1, SERVING_S, half_trusted
from tests.security.test_stolen_key import listening

SOON_S = 20.0


@dataclass
class Hostile:
    """The agent n1 with all its keys, in this process. `act` is what it does instead of handing an activation on."""

    act: Callable[[Stages, Activation], None]
    stages: Stages | None = None
    passed: list[Activation] = field(default_factory=list)
    heard: list[Frame] = field(default_factory=list)

    def pass_on(self, stages: Stages, frame: Activation) -> None:
        """In the place of what sends an activation to the next stage."""
        self.stages = stages
        self.passed.append(frame)
        self.act(stages, frame)

    async def until(self, *kinds: type[Frame]) -> Frame:
        """The next frame of one of these kinds."""
        async with asyncio.timeout(SOON_S):
            while True:
                for frame in self.heard:
                    if isinstance(frame, kinds):
                        self.heard.remove(frame)
                        return frame
                await asyncio.sleep(0.01)


@asynccontextmanager
async def hostile(
    cluster: OwnedCluster, patch: pytest.MonkeyPatch, act: Callable[[Stages, Activation], None]
) -> AsyncIterator[Hostile]:
    """n1 is run by somebody else now."""
    await cluster.stop(N1)
    found = Hostile(act)
    route = Stages.route

    def hear(stages: Stages, frame: Frame) -> None:
        found.heard.append(frame)
        route(stages, frame)

    def divert(stages: Stages, plan: SeenPlan, frame: Activation) -> None:
        found.pass_on(stages, frame)

    patch.setattr(Stages, "route", hear)
    patch.setattr(Stages, "_pass_on", divert)
    config = AgentConfig(N1, cluster.url, cluster.keys / N1, cluster.folder / N1 / "store", "cpu", 1)
    task = asyncio.create_task(run(config))
    try:
        yield found
    finally:
        await end([task])


def name_itself(stages: Stages, frame: Activation) -> None:
    stages._peers.send(N0, replace(frame, ingress=N1))


def answer_first(stages: Stages, frame: Activation) -> None:
    """In the name of the last stage, before that has seen anything; then as it should be."""
    tokens = tuple(Token(item.sequence, item.step, item.index, 0) for item in frame.items)
    stages._peers.send(N0, Result(ADDER, frame.epoch, frame.route, tokens, (), {}, N0, frame.times))
    stages._peers.send(N0, frame)


async def test_the_middle_of_a_private_cut_is_given_no_token_and_no_cache_of_the_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with half_trusted(tmp_path) as cluster, Client(cluster.url, keys=cluster.client_keys) as client:
        bus = await cluster.owner("CONTROL")
        ears = await listening(bus, cluster, N0)
        async with hostile(cluster, monkeypatch, name_itself) as middle:
            await control.deploy_and_wait(cluster.operator, DEPLOYED, SERVING_S)
            asking = asyncio.create_task(client.complete(ADDER, "12+30=", max_tokens=4))
            refused = await ears[N0].audited(AuditKind.FRAME_REFUSED, peer=N1)
            assert refused.deployment == ADDER
            assert str(refused.fields["error"]).startswith("'n1' does not drive 'adder'")

            assert middle.stages is not None
            (item,) = middle.passed[0].items
            epoch = middle.passed[0].epoch
            for first, last in ((0, 0), (9, 9), (0, 9)):
                ask = Fetch(ADDER, epoch, epoch, N1, item.sequence, first, last, 0, item.count)
                middle.stages._peers.send(N0, ask)
                cache = await middle.until(Cache)
                assert isinstance(cache, Cache)
                assert cache.tensors == {}
            assert not [frame for frame in middle.heard if isinstance(frame, Result)], "tokens came"
            asking.cancel()
        await bus.close()


async def test_the_middle_does_not_answer_in_the_name_of_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with half_trusted(tmp_path) as cluster, Client(cluster.url, keys=cluster.client_keys) as client:
        await control.deploy_and_wait(cluster.operator, DEPLOYED, SERVING_S)
        right = (await client.complete(ADDER, "12+30=", max_tokens=4)).token_ids
        async with hostile(cluster, monkeypatch, answer_first) as middle:
            await control.deploy_and_wait(cluster.operator, DEPLOYED.model_copy(update={"sealed": False}), SERVING_S)
            async with asyncio.timeout(SOON_S):
                while not middle.passed:
                    assert (await client.complete(ADDER, "12+30=", max_tokens=4)).token_ids == right
            assert (await client.complete(ADDER, "12+30=", max_tokens=4)).token_ids == right

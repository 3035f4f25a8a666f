"""Links that are cut without a word between nodes that live: frames take the bus, and nobody is called lost."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from benchmarks.faults.wires import Wires, why_not
from models.store import Store
from schemas.audit import AuditKind
from tests.integration.cluster_fixtures import CHAT, N0, N1, N2, PROMPT, SETTINGS, Oracle, Serving, serving
from tests.integration.cluster_fixtures import three_stages as three

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
ENDS_S = 60.0
"""A client gives up after 30 s in which nothing came."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wired(
    tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle
) -> AsyncIterator[tuple[Wires, Serving]]:
    """The decoder over three stages that an operator insists on, so that no plan goes around anything."""
    folder: Path = tmp_path_factory.mktemp("wired")
    async with (
        Wires(folder / "wires", (N0, N1, N2)) as wires,
        serving(folder / "cluster", zoo_store, oracle, host=wires.host, places=wires.places) as running,
    ):
        await running.deploy(CHAT, "llama", placement=three(N0, N1, N2), settings=SETTINGS)
        yield wires, running


@pytest.mark.parametrize("cut", [(N0, N1), (N1, N2), (N2, N0)])
async def test_streams_go_on_over_the_bus_with_the_same_tokens(
    wired: tuple[Wires, Serving], cut: tuple[str, str]
) -> None:
    wires, chat = wired
    await chat.answers()
    heard = len(chat.ear.heard)
    streams = await chat.accepted(chat.client, (1000, 240, 240))
    await streams[0].began()
    await wires.cut(*cut)
    try:
        for stream in streams:
            assert await stream.end(ENDS_S) is None
            assert stream.ids == chat.oracle.tokens(PROMPT, 1000)[: len(stream.ids)]
            assert stream.tokens[-1].finish_reason == "length"
    finally:
        await wires.mend(*cut)
    assert not [event for event in chat.ear.heard[heard:] if event.kind is AuditKind.NODE_LOST]
    await asyncio.wait_for(chat.answers(), ENDS_S)


async def test_links_that_were_given_up_while_they_were_cut_are_closed_at_either_end(
    wired: tuple[Wires, Serving],
) -> None:
    """Whoever gives a link up cannot say so to the other end, which only listens there."""
    wires, chat = wired
    await chat.answers()
    links = 2 * (len(chat.cluster.agents) - 1)
    for _ in range(3):
        await wires.cut(N0, N1)
        await asyncio.sleep(4.0)
        await wires.mend(N0, N1)
        await asyncio.sleep(3.0)
    await asyncio.wait_for(chat.answers(), ENDS_S)
    async with asyncio.timeout(ENDS_S):
        while any(sockets(chat.cluster.processes[node]) > links for node in (N0, N1)):  # noqa: ASYNC110
            await asyncio.sleep(0.5)


def sockets(pid: int) -> int:
    """Connections that a process has in its own network, but for that to the NATS server, and for what listens."""
    listed = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    established, server = [fields for fields in listed if fields[3] == "01"], 1
    return len(established) - server

"""Three NATS servers that are one, of which one is killed, hangs, or is cut off from the others."""

import asyncio
import time
from contextlib import suppress

from nats.errors import Error as NatsError

from benchmarks.faults.measure import Seen
from benchmarks.faults.scene import WHOLE_S, Scene
from benchmarks.faults.surroundings import SERVER_ENDS
from bus.streams import SPREAD
from schemas import subjects

NAMES = tuple(SERVER_ENDS)
KEPT = (*SPREAD, subjects.STREAM_AUDIT)
ELECTED_S = 10.0
"""A server waits 4 to 9 s for one that leads before it stands itself, which nothing configures, and is then elected."""
POLL_S = 0.1
ZOMBIE_S = 1.0
"""For so long a server that hung is listened to after it goes on."""


async def server_killed(scene: Scene) -> Seen:
    """One after the other, by run."""
    victim = NAMES[scene.index % len(NAMES)]
    led = await leads(scene)
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.cluster.kill(victim)
    until = await scene.went_on(affected)
    await scene.cluster.start(victim)
    await kept_by_all(scene)
    return Seen(at, affected, until, step=f"{victim}{', which led the journal' if victim == led else ''}")


async def leader_hung(scene: Scene) -> Seen:
    """The one that leads the stream of the journal: to the others it is cut off, and it still believes that it leads
    when it goes on."""
    victim = await leads(scene)
    affected = tuple(scene.load.live)
    at = time.monotonic()
    await scene.cluster.pause(victim)
    until = await scene.went_on(affected)
    scene.wire.from_now()
    await scene.cluster.resume(victim)
    await asyncio.sleep(ZOMBIE_S)
    await kept_by_all(scene)
    return Seen(at, affected, until, step=victim)


async def leader_cut(scene: Scene) -> Seen:
    """The one that leads the stream of the journal is cut off from the two others; its members still reach it."""
    victim = await leads(scene)
    others = [name for name in NAMES if name != victim]
    affected = tuple(scene.load.live)
    at = time.monotonic()
    for other in others:
        await scene.wires.cut(SERVER_ENDS[victim], SERVER_ENDS[other])
    until = await scene.went_on(affected)
    scene.wire.from_now()
    for other in others:
        await scene.wires.mend(SERVER_ENDS[victim], SERVER_ENDS[other])
    await asyncio.sleep(ZOMBIE_S)
    await kept_by_all(scene)
    return Seen(at, affected, until, step=victim)


async def leads(scene: Scene) -> str:
    """The server that leads the journal's stream."""
    async with asyncio.timeout(WHOLE_S):
        while True:
            with suppress(NatsError, TimeoutError):
                info = await scene.connection.jetstream().stream_info(subjects.STREAM_JOURNAL)
                if info.cluster is not None and info.cluster.leader:
                    return info.cluster.leader
            await asyncio.sleep(POLL_S)


async def kept_by_all(scene: Scene) -> None:
    """Wait until all that is kept is on every server, and none lags: another one may go then."""
    js = scene.connection.jetstream()
    stream, cluster = "", None
    try:
        async with asyncio.timeout(WHOLE_S):
            for stream in KEPT:
                while True:
                    with suppress(NatsError, TimeoutError):
                        cluster = (await js.stream_info(stream)).cluster
                        if cluster is not None and cluster.leader:
                            peers = {peer.name for peer in cluster.replicas or () if peer.current and not peer.offline}
                            if {*peers, cluster.leader} == set(NAMES):
                                break
                    await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise TimeoutError(f"{stream} is not kept by all after {WHOLE_S:g} s: {cluster}") from None

"""A process that tells the audit trail something every few milliseconds until SIGTERM: `URL KEYS NAME MEMORY`.

It prints the number of each event that it recorded.
"""

import asyncio
import signal
import sys
from pathlib import Path

from bus.audit import AuditTrail
from bus.connection import connect
from bus.identity import load_identity
from bus.stopping import end
from bus.streams import ensure_streams
from schemas.audit import AuditKind
from schemas.base import NodeId

EVERY_S = 0.01
GOODBYE_S = 30.0


async def main(url: str, keys: str, name: str, memory: str) -> None:
    client = await connect(url, name)
    trail = AuditTrail(
        await ensure_streams(client), load_identity(Path(keys) / name, NodeId(name)), memory=Path(memory)
    )
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    running = asyncio.create_task(trail.run())
    number = 0
    while not over.is_set():
        number += 1
        trail.record(AuditKind.LINK_CHANGED, "a direct link came up", number=number)
        print(number, flush=True)
        await asyncio.sleep(EVERY_S)
    await trail.drain(GOODBYE_S)
    await end([running])
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

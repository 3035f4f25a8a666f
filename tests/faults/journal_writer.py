"""A process that journals rounds of one request and prints each token once it is stored: `URL DEPLOYMENT LIFE`."""

import asyncio
import sys
import time

from bus.connection import connect
from bus.journal import Journal
from schemas.base import DeploymentName, LifeId, RequestId
from schemas.journal import AcceptedRequest, Run


async def main(url: str, deployment: str, life: str) -> None:
    client = await connect(url, life)
    over = asyncio.Event()
    journal = Journal(client, DeploymentName(deployment), LifeId(life), lambda _: over.set(), time.monotonic)
    running = asyncio.create_task(journal.run())
    handle = await journal.accept(AcceptedRequest(RequestId("r"), "m", b"{}", "", "inbox"))
    index = 0
    while not over.is_set():
        journal.tokens([Run(handle, index, (index * 7,))], lambda i=index: print(i, flush=True))  # type: ignore[misc]
        index += 1
        await asyncio.sleep(0.002)
    print("superseded", flush=True)
    await running
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

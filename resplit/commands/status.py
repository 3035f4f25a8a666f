"""`resplit status`: what the orchestrator sees, once or as it changes."""

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.defaults import DEFAULT_URL
from resplit.options import AsJson, Keys, Url
from resplit.output import print_json, print_table
from resplit.view import DEPLOYMENT_COLUMNS, NODE_COLUMNS, deployment_row, led, node_row, unheard

if TYPE_CHECKING:
    from resplit.access import Access
    from schemas.control import StatusReply

ASK_S = 5.0
"""Of a look: an orchestrator that plans answers within this; one that does not is shown as silent and asked again."""


def status(
    keys: Keys,
    url: Url = DEFAULT_URL,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds from one look to the next.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show the nodes and the deployments as the orchestrator sees them.

    With --watch a terminal is drawn anew at every look; anything else gets one listing (with --json one line) a look.
    """
    from resplit import control  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415

    at = Access(url, keys)
    if watch:
        asyncio.run(_watch(at, interval, as_json))
        return
    _show(asyncio.run(control.status(at)), as_json)


async def _watch(at: "Access", interval_s: float, as_json: bool) -> None:
    from resplit import control  # noqa: PLC0415
    from resplit.live import draw, list_looks  # noqa: PLC0415

    connection = await at.connect("resplit-status", *control.READERS)
    ask = partial(control.status_on, connection, ASK_S)
    try:
        if sys.stdout.isatty() and not as_json:
            await draw(ask, interval_s)
        else:
            await list_looks(ask, interval_s, lambda reply: _show(reply, as_json))
    finally:
        await connection.close()


def _show(reply: "StatusReply", as_json: bool) -> None:
    if as_json:
        print_json(reply)
        return
    print(led(reply))
    if not reply.nodes:
        print("no node has reported; start one with `resplit agent`")
    else:
        print_table("Nodes", NODE_COLUMNS, [node_row(node, reply.drained) for node in reply.nodes])
    if missing := unheard(reply):
        print(f"drained and not here: {', '.join(missing)}")
    print()
    if not reply.deployments:
        print("nothing is deployed; start with `resplit deploy MODEL`")
        return
    print_table("Deployments", DEPLOYMENT_COLUMNS, [deployment_row(found) for found in reply.deployments])
    for found in reply.deployments:
        if found.prediction is not None:
            print(f"{found.name}: {found.prediction}")

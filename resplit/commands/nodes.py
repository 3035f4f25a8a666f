"""What operators say of a node: `drain` and `undrain` for maintenance, `trust` and `distrust` for sensitive blocks."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.defaults import DEFAULT_URL
from resplit.options import AsJson, Keys, Timeout, Url
from resplit.output import print_json, spinner
from schemas.base import NodeId

if TYPE_CHECKING:
    from resplit.access import Access
    from schemas.control import DeploymentStatus

DRAIN_TIMEOUT_S = 900.0
"""Other nodes may have to fetch gigabytes first, and then long answers still end on the old plan."""

Node = Annotated[str, typer.Argument(help="The node's name.", metavar="NODE")]


def drain(
    node: Node,
    keys: Keys,
    url: Url = DEFAULT_URL,
    wait: Annotated[bool, typer.Option("--wait", help="Return once no plan uses it: it may be switched off.")] = False,
    timeout: Timeout = DRAIN_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Use NODE no more: its blocks move to other nodes while they serve, and stay away until `undrain`.

    Refused, and nothing changed, if what runs on it does not fit on the others.
    """
    from resplit import control  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415

    if not wait:
        reply = asyncio.run(control.drain(Access(url, keys), NodeId(node)))
        if as_json:
            print_json(reply)
        elif reply.deployments:
            print(f"{node}: drains; still in use by {', '.join(reply.deployments)} (--wait tells when it is not)")
        else:
            print(f"{node}: drained; no plan uses it, it is safe to switch off")
        return
    last: tuple[str, ...] | None = None

    def show(using: "tuple[DeploymentStatus, ...]") -> None:
        nonlocal last
        names = tuple(found.name for found in using)
        if names and names != last and not as_json:
            print(f"{node}: drains; still in use by {', '.join(names)}", flush=True)
        last = names

    with spinner(f"draining {node}"):
        asyncio.run(control.drain_and_wait(Access(url, keys), NodeId(node), timeout, show))
    if as_json:
        print_json({"node": node, "deployments": []})
    else:
        print(f"{node}: drained; no plan uses it, it is safe to switch off")


def undrain(node: Node, keys: Keys, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let plans use NODE again; what runs elsewhere stays there until a better plan is worth the move."""
    from resplit import control  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415

    reply = asyncio.run(control.undrain(Access(url, keys), NodeId(node)))
    if as_json:
        print_json(reply)
    else:
        print(f"{node}: may be used again")


def trust(node: Node, keys: Keys, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let NODE hold sensitive blocks; needed for a node of the cloud, and for one that was distrusted."""
    from resplit.access import Access  # noqa: PLC0415

    _say(node, True, Access(url, keys), as_json)


def distrust(node: Node, keys: Keys, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let NODE hold no sensitive block: those that are on it move at once; what is not sensitive may stay.

    Refused, and nothing changed, if the trusted nodes have no room for them.
    """
    from resplit.access import Access  # noqa: PLC0415

    _say(node, False, Access(url, keys), as_json)


def _say(node: str, trusted: bool, at: "Access", as_json: bool) -> None:
    from resplit import control  # noqa: PLC0415

    reply = asyncio.run(control.trust(at, NodeId(node), trusted))
    if as_json:
        print_json(reply)
    elif trusted:
        print(f"{node}: trusted; it may hold sensitive blocks")
    elif reply.deployments:
        print(f"{node}: not trusted; sensitive blocks move away from it: {', '.join(reply.deployments)}")
    else:
        print(f"{node}: not trusted; it holds no sensitive block")

"""Several NATS servers of one cluster: `servers` makes those that are one, `leaf` one for a site."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from resplit.commands.members import Cluster, Locked, Roots, certified_for, holders_of, now
from resplit.options import AsJson
from resplit.output import print_json
from schemas.base import SiteId
from schemas.errors import ErrorCode, ResplitError

CARRY = "carry {folder} to {host}, and there: resplit install-service nats --server {name} --now"

RELOAD_THERE = "there: nats-server --signal reload   (they let it in)"


def servers(
    server: Annotated[
        list[str], typer.Argument(help="One, or three or five that are one, each as NAME=HOST.", metavar="NAME=HOST...")
    ],
    cluster: Cluster,
    root: Roots = None,
    locked: Locked = False,
    as_json: AsJson = False,
) -> None:
    """Make what the cluster's NATS servers take, a folder for each: configurations by which they find each other,
    certificates, logins. Again makes all of it anew, before certificates end or for other hosts."""
    from bus.servers import make_servers  # noqa: PLC0415

    hosts = _named(server)
    key = holders_of(cluster, root, locked)[0].authority
    folders = make_servers(cluster, hosts, key, now=now())
    _say(folders, hosts, cluster, as_json)


def leaf(
    server: Annotated[
        str, typer.Argument(help="Its name, and where the site's members reach it.", metavar="NAME=HOST")
    ],
    hub: Annotated[
        list[str], typer.Option("--hub", help="The host of a server that it hangs on, once for each (its port: 7422).")
    ],
    cluster: Cluster,
    home: Annotated[
        bool,
        typer.Option(
            "--home",
            help="The site is the home of deployments, SITE/NAME: it keeps and steers them itself, also alone.",
        ),
    ] = False,
    root: Roots = None,
    locked: Locked = False,
    as_json: AsJson = False,
) -> None:
    """Make what a leaf node takes: a NATS server for the agents and applications of a site, which hangs on others. Made
    again it keeps its login, and is a home only if that is said again."""
    from bus.founding import JETSTREAM  # noqa: PLC0415
    from bus.servers import make_leaf  # noqa: PLC0415

    hosts = _named([server])
    [(name, host)] = hosts.items()
    key = holders_of(cluster, root, locked)[0].authority
    folder = make_leaf(cluster, name, host, hub, key, now=now(), store=JETSTREAM if home else None)
    _say((folder,), hosts, cluster, as_json)
    if not as_json:
        print(f"  and to each server that it hangs on its logins.conf from {folder.parent}, and {RELOAD_THERE}")
        if home:
            from bus.identity import orchestrator_of  # noqa: PLC0415

            who = orchestrator_of(SiteId(name))
            print(f"  next: resplit enroll {who} --role orchestrator --home {name} --cluster {cluster}")


def _named(given: Sequence[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in given]
    bad = next((one for one, (name, equals, host) in zip(given, pairs, strict=True) if not (name and host)), None)
    if bad is not None:
        message = f"{bad!r} is not NAME=HOST, as a=10.0.0.2"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "server")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ResplitError(ErrorCode.INVALID_REQUEST, "two servers have one name; give each its own", "server")
    return {name: host for name, _, host in pairs}


def _say(folders: Sequence[Path], hosts: dict[str, str], cluster: Path, as_json: bool) -> None:
    from bus.server_certificate import read_server_certificate  # noqa: PLC0415

    if as_json:
        print_json({"servers": {folder.name: str(folder) for folder in folders}})
        return
    for folder in folders:
        print(f"{folder}: {certified_for(read_server_certificate(folder))}")
        print(f"  {CARRY.format(folder=folder, host=hosts[folder.name], name=folder.name)}")

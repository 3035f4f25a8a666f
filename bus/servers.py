"""Several NATS servers of one cluster: what each of them takes, in a folder of its own to be carried to its machine.

Either three (or five) servers that are one, each with a part of what is kept; or one; and at sites leaf nodes that hang
on them. A site that is the home of deployments keeps what is theirs itself. A folder holds what `resplit init` writes
for a single server (`bus.server_certificate`), of its own: its configuration, its certificate and key, the authority,
and the logins, which every change of who belongs writes anew. That of a leaf node has `leaf.key` besides, with which it
logs in where it hangs on, and that of a home the file `home`, by which it is known as one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from secrets import token_bytes

from cryptography.hazmat.primitives.asymmetric import ec

from bus.cluster_folder import HOME, LEAF_LOGIN, LEAF_SEED, SERVERS, open_cluster, write_logins
from bus.credentials import SEED_BYTES, nkey_seed, public_nkey
from bus.folders import read_public
from bus.founding import JETSTREAM
from bus.natsconf import (
    CLIENT_PORT,
    LEAF_PORT,
    ROUTE_NAME,
    ROUTE_PORT,
    SERVER_FILE,
    Hub,
    Routes,
    leaf_login,
    server_conf,
)
from bus.remembered import PRIVATE, PUBLIC, write_durably
from bus.server_certificate import certify, checked_hosts, server_files
from natstls.contexts import AUTHORITY
from schemas.base import NAME_PATTERN, NAME_RULE
from schemas.errors import ErrorCode, ResplitError

ANYWHERE = "0.0.0.0"
SERVERS_MAX = 5
"""What is kept is agreed upon by most of them: more make every write slower and nothing safer."""


@dataclass(frozen=True)
class Ports:
    """Where a server listens, of every address of its machine unless told otherwise."""

    host: str = ANYWHERE
    clients: int = CLIENT_PORT
    routes: int = ROUTE_PORT
    leaves: int = LEAF_PORT


def make_servers(
    cluster: Path,
    hosts: Mapping[str, str],
    authority_key: ec.EllipticCurvePrivateKey,
    *,
    now: datetime,
    ports: Mapping[str, Ports] | None = None,
    store: Path = JETSTREAM,
) -> tuple[Path, ...]:
    """Make the folders of one server, or of three or five that are one, given the host of each by name.

    Again makes keys, certificates and configurations anew. Raises `ResplitError(INVALID_REQUEST)` for another number, a
    name that cannot be a folder's, what is no host, and another authority's key.
    """
    if len(hosts) not in (1, 3, SERVERS_MAX):
        message = f"{len(hosts)} servers: most of them have to agree, so name one, three or {SERVERS_MAX}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "server")
    _check_names(hosts)
    checked_hosts(tuple(hosts.values()))
    there = []
    for name in hosts:
        files = _folder(cluster, name)
        # A member that is told of the others by address looks for the host that it knows, in any certificate of theirs.
        certify(cluster, tuple(hosts.values()), authority_key, now=now, into=files, names=[ROUTE_NAME])
        conf = cluster_server_conf(name, hosts, ports or {}, store)
        _fill(cluster, files, conf)
        there.append(files)
    write_logins(cluster, open_cluster(cluster).roster)
    return tuple(there)


def make_leaf(
    cluster: Path,
    name: str,
    host: str,
    hubs: Sequence[str],
    authority_key: ec.EllipticCurvePrivateKey,
    *,
    now: datetime,
    ports: Ports = Ports(),
    store: Path | None = None,
) -> Path:
    """Make the folder of the leaf node `name`, which members reach at `host` and which hangs on `hubs`, each a host or
    host:port. With a `store`, for JetStream, the site `name` is the home of deployments. Again keeps its login. Errors
    are those of `make_servers`."""
    _check_names((name,))
    if not hubs:
        raise ResplitError(ErrorCode.INVALID_REQUEST, "a leaf node hangs on a server; name its host", "hub")
    for hub in hubs:
        checked_hosts((hub.rpartition(":")[0] if re.search(r":\d+$", hub) else hub,))
    files = _folder(cluster, name)
    certify(cluster, (host,), authority_key, now=now, into=files)
    if not (files / LEAF_SEED).exists():
        seed = nkey_seed(token_bytes(SEED_BYTES))
        write_durably(files / LEAF_SEED, leaf_login(seed).encode(), PRIVATE)
        write_durably(files / LEAF_LOGIN, public_nkey(seed).encode(), PUBLIC)
    if store is None:
        (files / HOME).unlink(missing_ok=True)
    else:
        write_durably(files / HOME, b"", PUBLIC)
    _fill(cluster, files, leaf_server_conf(name, hubs, ports, store))
    write_logins(cluster, open_cluster(cluster).roster)
    return files


def cluster_server_conf(name: str, hosts: Mapping[str, str], ports: Mapping[str, Ports], store: Path) -> str:
    """PURE: the configuration of the server `name` among those at `hosts`."""
    own = ports.get(name, Ports())
    routes = routes_of(name, hosts, ports)
    return server_conf(
        f"{own.host}:{own.clients}",
        store,
        server_files(Path()),
        name=name,
        advertise=None if routes is None else f"{_bracketed(hosts[name])}:{own.clients}",
        routes=routes,
        leaves=f"{own.host}:{own.leaves}",
    )


def routes_of(name: str, hosts: Mapping[str, str], ports: Mapping[str, Ports]) -> Routes | None:
    """PURE: how the server `name` meets the others at `hosts`; None where there are none."""
    at = {one: ports.get(one, Ports()) for one in hosts}
    others = tuple(f"{_bracketed(host)}:{at[one].routes}" for one, host in hosts.items() if one != name)
    return Routes(f"{at[name].host}:{at[name].routes}", others) if others else None


def leaf_server_conf(name: str, hubs: Sequence[str], ports: Ports = Ports(), store: Path | None = None) -> str:
    """PURE: the configuration of the leaf node `name`, with a `store` of a home."""
    servers = tuple(hub if re.search(r":\d+$", hub) else f"{hub}:{LEAF_PORT}" for hub in hubs)
    listen = f"{ports.host}:{ports.clients}"
    domain = None if store is None else name
    return server_conf(listen, store, server_files(Path()), name=name, hub=Hub(servers, LEAF_SEED), domain=domain)


def _fill(cluster: Path, files: Path, conf: str) -> None:
    write_durably(files / AUTHORITY, read_public(cluster / AUTHORITY), PUBLIC)
    write_durably(files / SERVER_FILE, conf.encode(), PUBLIC)


def _folder(cluster: Path, name: str) -> Path:
    files = cluster / SERVERS / name
    files.mkdir(parents=True, exist_ok=True, mode=0o700)
    return files


def _check_names(names: Sequence[str] | Mapping[str, str]) -> None:
    for name in names:
        if re.fullmatch(NAME_PATTERN, name) is None:
            message = f"{name!r} cannot name a server; {NAME_RULE}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "server")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host

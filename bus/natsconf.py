"""PURE: the configuration of a cluster's nats-server, as text: the server in one file, who may log in in another.

Of several servers each has a file of its own: those of a cluster of servers name each other as routes, and a leaf node,
which serves a site, names those that it hangs on. Only EDGE reaches a leaf: those who steer are at the hub, and so is
all that JetStream keeps, but for what a site keeps that is the home of deployments. Such a one has an account CONTROL
of its own, which no other server knows.

The server's file includes the other one. To enrol somebody, or to revoke somebody, write that one anew (to a new
file, then rename) and send the server SIGHUP: connections whose login stays go on, a login that has gone is cut off.
A file that cannot be read, or that has a mistake, leaves a running server as it was, and stops one that starts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bus.credentials import ACCOUNT_OF, Account, Login
from bus.permissions import Grant, allowed, asked_of_control, heard_at_the_edge, heard_in_control
from schemas.base import Home, SiteId
from schemas.errors import ErrorCode, ResplitError

LOGINS_FILE = "logins.conf"
SERVER_FILE = "nats-server.conf"
MAX_PAYLOAD_BYTES = 8 << 20
MAX_FILE_STORE_BYTES = 20 << 30
CLIENT_PORT, ROUTE_PORT, LEAF_PORT = 4222, 6222, 7422
ROUTE_NAME = "route.resplit.internal"
"""Stands in the certificates of servers that may be routes to each other, and in no member's: every member has one of
the same authority, and could otherwise pass for a server, to which all is told."""
WRITTEN = "# Written by enrolment; whatever is changed by hand is lost. The reasons are those of bus/permissions.py."
NOBODY = f"""\
    {{
      # Nobody is enrolled, and a server without any login would let everybody in. Nobody knows this password either.
      user: nobody
      password: "$2a$04${"." * 53}"
      permissions: {{ publish: {{ deny: ">" }}, subscribe: {{ deny: ">" }} }}
    }}"""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of the server. `authority`: whose certificates it demands from whoever connects."""

    certificate: Path
    key: Path
    authority: Path


@dataclass(frozen=True)
class Routes:
    """How a server meets the others of its cluster."""

    listen: str
    """host:port"""
    others: tuple[str, ...]
    """host:port of each, as the others' certificates name the host."""


@dataclass(frozen=True)
class Hub:
    """What a leaf node hangs on."""

    servers: tuple[str, ...]
    """host:port of each, where leaf nodes are let in."""
    login_file: str
    """With its own NKey's seed (`leaf_login`), beside the configuration."""


@dataclass(frozen=True)
class LeafLogin:
    """A leaf node as those that it hangs on know it."""

    name: str
    nkey: str


def server_conf(
    listen: str,
    store: Path | None,
    tls: TlsFiles,
    *,
    name: str = "resplit-1",
    logins_file: str = LOGINS_FILE,
    max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    max_file_store_bytes: int = MAX_FILE_STORE_BYTES,
    ports_folder: Path | None = None,
    survives_power_cuts: bool = True,
    advertise: str | None = None,
    routes: Routes | None = None,
    leaves: str | None = None,
    hub: Hub | None = None,
    domain: str | None = None,
    monitored: bool = False,
) -> str:
    """The whole configuration but for the logins, which stand in `logins_file` beside it.

    `listen` is "host:port"; port -1 takes any that is free, and the server writes it into `ports_folder`. `store`:
    where JetStream keeps what it keeps; None: this server, a leaf node, has none. `domain`: what JetStream is called
    there, where it is not the hub's. Without `survives_power_cuts` a write is acknowledged before it is on the disk,
    which is quicker. `advertise`: host:port by which members of the others of its cluster hear of this server;
    `leaves`: host:port where leaf nodes are let in; `monitored`: it tells this machine who is connected, over HTTP at
    any free port. Raises `ResplitError(INVALID_REQUEST)` for what cannot stand in the
    file.
    """
    told = "" if advertise is None else f"client_advertise: {quoted(advertise)}\n"
    more = [] if routes is None else [_cluster(routes, tls)]
    more += [] if leaves is None else [_leaves(leaves, tls)]
    more += [] if hub is None else [_hub(hub, tls)]
    kept = [] if store is None else [_jetstream(store, max_file_store_bytes, survives_power_cuts, domain)]
    between = "\n".join((*kept, *more))
    ports = "" if ports_folder is None else f"ports_file_dir: {quoted(str(ports_folder))}\n"
    ports += 'http: "127.0.0.1:-1"\n' if monitored else ""
    return f"""\
# The NATS server of a Resplit cluster: nats-server -c nats-server.conf (check it first with -t).

server_name: {quoted(name)}
listen: {quoted(listen)}
{told}{ports}
# Requests are taken up to 1 MiB, events up to 1 MiB, files travel in pieces of 512 KiB. Replies may be larger; one
# that is larger than this is answered payload_too_large.
max_payload: {_size(max_payload_bytes)}

# What may wait for one slow connection before the server drops it: a prefill that goes over the bus is tens of
# megabytes at once.
max_pending: 128MB

# A node whose link died in silence is forgotten within half a minute; agents ping every two seconds themselves.
ping_interval: "10s"
ping_max: 2

{between}
tls {{
  # A path that is not whole begins in the working directory of the server, not beside this file.
  cert_file: {quoted(str(tls.certificate))}
  key_file: {quoted(str(tls.key))}
  # Whoever connects shows a certificate of this authority, before it may say a word.
  ca_file: {quoted(str(tls.authority))}
  verify: true
  min_version: "1.3"
  # TLS begins with the first byte: nothing is said in the open, and nobody can say for the server that it has none.
  handshake_first: true
}}

# Who may connect and what each may do. Every change of who belongs writes this file anew: put it here, and then
# nats-server --signal reload
include {_included(logins_file)}
"""


def logins_conf(logins: Iterable[Login], leaves: Iterable[LeafLogin] = (), home: Home = None) -> str:
    """Every login at the servers of `home` and what it may do, each line with its reason; the same logins give the same
    text. Orchestrators log in at home alone.

    Raises `ResplitError(INVALID_REQUEST)` where a name or a key stands twice.
    """
    every = sorted(logins, key=lambda login: (login.role, login.name))
    sites = _homes(every)
    found = [login for login in every if login.role != "orchestrator" or login.home == home]
    leaf_logins = sorted(leaves, key=lambda leaf: leaf.name)
    _check_single("name", [login.name for login in every])
    _check_single("nkey", [*(login.nkey for login in every), *(leaf.nkey for leaf in leaf_logins)])
    return f"""\
{WRITTEN}

accounts {{
{_account("CONTROL", found, home, sites)}
{_account("EDGE", found, home, sites, leaf_logins)}
}}
"""


def leaf_login(seed: str) -> str:
    """With what a leaf node logs in at its hub: the file that its configuration includes."""
    return f"nkey: {quoted(seed)}\n"


def leaf_logins_conf(logins: Iterable[Login]) -> str:
    """The logins at a leaf node: of those who serve and ask, which is all that reaches it. What they ask of those who
    steer the servers answer that it hangs on. Errors are those of `logins_conf`."""
    every = sorted(logins, key=lambda login: (login.role, login.name))
    found, sites = [one for one in every if ACCOUNT_OF[one.role] == "EDGE"], _homes(every)
    _check_single("name", [login.name for login in found])
    _check_single("nkey", [login.nkey for login in found])
    users = "\n".join(_user(login, sites) for login in found) or NOBODY
    return f"""\
{WRITTEN}

accounts {{
  EDGE {{
    users: [
{users}
    ]
  }}
}}
"""


def quoted(text: str) -> str:
    """`text` as a string of the configuration; raises `ResplitError(INVALID_REQUEST)` for control characters."""
    if not text.isprintable():
        message = f"{text!r} has characters that cannot stand in a configuration; choose another"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _homes(logins: Iterable[Login]) -> tuple[SiteId, ...]:
    """The sites that have orchestrators of their own."""
    return tuple(sorted({SiteId(one.home) for one in logins if one.role == "orchestrator" and one.home is not None}))


def _jetstream(store: Path, max_file_store_bytes: int, survives_power_cuts: bool, domain: str | None) -> str:
    sync = """
  # JetStream acknowledges before it has written to the disk unless it is told otherwise.
  sync_interval: always"""
    named = "" if domain is None else f"\n  domain: {quoted(domain)}"
    return f"""\
jetstream {{
  store_dir: {quoted(str(store))}{named}
  max_memory_store: 64MB
  # Plans, receipts and desired state are megabytes; what grows is the audit stream, which nothing deletes.
  max_file_store: {_size(max_file_store_bytes)}{sync if survives_power_cuts else ""}
}}
"""


def _cluster(routes: Routes, tls: TlsFiles) -> str:
    others = "\n".join(f"    {quoted(f'tls://{other}')}" for other in routes.others)
    return f"""\
# The other servers of the cluster: each keeps its part, and any of them serves.
cluster {{
  name: resplit
  listen: {quoted(routes.listen)}
  routes: [
{others}
  ]
  # A server that is cut off from the others says so to its members, who then go to another, within seconds.
  ping_interval: "2s"
  ping_max: 2
  tls {{
    cert_file: {quoted(str(tls.certificate))}
    key_file: {quoted(str(tls.key))}
    ca_file: {quoted(str(tls.authority))}
    # Members have certificates of the same authority: only one that names this is a server's.
    verify_and_map: true
    min_version: "1.3"
    timeout: 5
  }}
  authorization {{ user: {quoted(ROUTE_NAME)} }}
}}
"""


def _leaves(listen: str, tls: TlsFiles) -> str:
    return f"""\
# Servers of sites, each with a login of its own in the file of logins.
leafnodes {{
  listen: {quoted(listen)}
  tls {{
    cert_file: {quoted(str(tls.certificate))}
    key_file: {quoted(str(tls.key))}
    ca_file: {quoted(str(tls.authority))}
    verify: true
    min_version: "1.3"
    handshake_first: true
  }}
}}
"""


def _hub(hub: Hub, tls: TlsFiles) -> str:
    urls = ", ".join(quoted(f"tls://{server}") for server in hub.servers)
    return f"""\
# The servers that this one hangs on: what its members say to others goes there, and what is for them comes from there.
leafnodes {{
  remotes: [
    {{
      urls: [{urls}]
      # With the seed of its own NKey: secret.
      include {_included(hub.login_file)}
      account: EDGE
      tls {{
        cert_file: {quoted(str(tls.certificate))}
        key_file: {quoted(str(tls.key))}
        ca_file: {quoted(str(tls.authority))}
        min_version: "1.3"
        handshake_first: true
      }}
    }}
  ]
}}
"""


def _account(
    account: Account, logins: Sequence[Login], home: Home, sites: Sequence[SiteId], leaves: Sequence[LeafLogin] = ()
) -> str:
    asked = asked_of_control(home).items()
    control = account == "CONTROL"
    of_edge, of_control = heard_in_control(home), heard_at_the_edge(home)
    heard, told, other = (of_edge, of_control, "EDGE") if control else (of_control, of_edge, "CONTROL")
    exports = [f"{{ stream: {quoted(subject)} }}" for subject in told]
    imports = [
        f"{{ stream: {{ account: {other}, subject: {quoted(there)} }}"
        + (" }" if here == there else f", to: {quoted(here)} }}")
        for there, here in heard.items()
    ]
    if control:
        exports += [f"{{ service: {quoted(there)} }}" for _, there in asked]
    else:
        imports += [
            f"{{ service: {{ account: {other}, subject: {quoted(there)} }}, to: {quoted(here)} }}"
            for here, there in asked
        ]
    users = [_user(login, sites) for login in logins if ACCOUNT_OF[login.role] == account]
    users += [_leaf(leaf) for leaf in leaves]
    if not logins and not control:
        users = [NOBODY]
    lines = "\n".join
    return f"""\
  {account} {{{" jetstream: enabled" if control else ""}
    exports: [
{lines(f"      {one}" for one in exports)}
    ]
    imports: [
{lines(f"      {one}" for one in imports)}
    ]
    users: [
{lines(users)}
    ]
  }}"""


def _leaf(leaf: LeafLogin) -> str:
    return f"""\
    {{
      # The leaf node {leaf.name}: it carries what its members may say, and all that they may hear.
      nkey: {leaf.nkey}
      allowed_connection_types: ["LEAFNODE"]
    }}"""


def _user(login: Login, sites: Sequence[SiteId]) -> str:
    may = allowed(login, sites)
    return f"""\
    {{
      # {login.role} {login.name}
      nkey: {login.nkey}
      allowed_connection_types: ["STANDARD"]
      permissions: {{
        publish: {{ allow: [
{_lines(may.publish)}
        ] }}
        subscribe: {{ allow: [
{_lines(may.subscribe)}
        ] }}
        allow_responses: false
      }}
    }}"""


def _lines(grants: Sequence[Grant]) -> str:
    said = [(quoted(g.subject if g.queue is None else f"{g.subject} {g.queue}"), g.why) for g in grants]
    width = max(len(subject) for subject, _ in said)
    return "\n".join(f"          {subject:<{width}}  # {why}" for subject, why in said)


def _included(name: str) -> str:
    if Path(name).name != name:
        message = f"{name!r}: the file of logins lies beside the server's configuration; give its name alone"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "logins_file")
    return quoted(name)


def _size(count: int) -> str:
    unit, shift = next(((u, s) for u, s in (("GB", 30), ("MB", 20), ("KB", 10)) if not count % (1 << s)), ("", 0))
    return f"{count >> shift}{unit}"


def _check_single(what: str, values: Sequence[str]) -> None:
    doubled = next((value for value, times in Counter(values).items() if times > 1), None)
    if doubled is not None:
        message = f"several logins have the {what} {doubled!r}; each member has its own"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, what)

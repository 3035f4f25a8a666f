"""PURE: the configuration of a cluster's nats-server, as text: the server in one file, who may log in in another.

The server's file includes the other one. To enrol somebody, or to revoke somebody, write that one anew (to a new
file, then rename) and send the server SIGHUP: connections whose login stays go on, a login that has gone is cut off.
A file that cannot be read, or that has a mistake, leaves a running server as it was, and stops one that starts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bus.credentials import ACCOUNT_OF, Account, Login
from bus.permissions import HEARD_AT_THE_EDGE, HEARD_IN_CONTROL, Grant, allowed, asked_of_control
from schemas.errors import ErrorCode, ResplitError

LOGINS_FILE = "logins.conf"
SERVER_FILE = "nats-server.conf"
MAX_PAYLOAD_BYTES = 8 << 20
MAX_FILE_STORE_BYTES = 20 << 30
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


def server_conf(
    listen: str,
    store: Path,
    tls: TlsFiles,
    *,
    name: str = "resplit-1",
    logins_file: str = LOGINS_FILE,
    max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    max_file_store_bytes: int = MAX_FILE_STORE_BYTES,
    ports_folder: Path | None = None,
    survives_power_cuts: bool = True,
) -> str:
    """The whole configuration but for the logins, which stand in `logins_file` beside it.

    `listen` is "host:port"; port -1 takes any that is free, and the server writes it into `ports_folder`. Without
    `survives_power_cuts` a write is acknowledged before it is on the disk, which is quicker. Raises
    `ResplitError(INVALID_REQUEST)` for what cannot stand in the file.
    """
    ports = "" if ports_folder is None else f"ports_file_dir: {quoted(str(ports_folder))}\n"
    sync = """
  # JetStream acknowledges before it has written to the disk unless it is told otherwise.
  sync_interval: always"""
    return f"""\
# The NATS server of a Resplit cluster: nats-server -c nats-server.conf (check it first with -t).

server_name: {quoted(name)}
listen: {quoted(listen)}
{ports}
# Requests are taken up to 1 MiB, events up to 1 MiB, files travel in pieces of 512 KiB. Replies may be larger; one
# that is larger than this is answered payload_too_large.
max_payload: {_size(max_payload_bytes)}

# What may wait for one slow connection before the server drops it: a prefill that goes over the bus is tens of
# megabytes at once.
max_pending: 128MB

# A node whose link died in silence is forgotten within half a minute; agents ping every two seconds themselves.
ping_interval: "10s"
ping_max: 2

jetstream {{
  store_dir: {quoted(str(store))}
  max_memory_store: 64MB
  # Plans, receipts and desired state are megabytes; what grows is the audit stream, which nothing deletes.
  max_file_store: {_size(max_file_store_bytes)}{sync if survives_power_cuts else ""}
}}

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


def logins_conf(logins: Iterable[Login]) -> str:
    """Every login and what it may do, each line with its reason; the same logins give the same text.

    Raises `ResplitError(INVALID_REQUEST)` where a name or a key stands twice.
    """
    found = sorted(logins, key=lambda login: (login.role, login.name))
    _check_single("name", [login.name for login in found])
    _check_single("nkey", [login.nkey for login in found])
    return f"""\
# Written by enrolment; whatever is changed by hand is lost. The reasons are those of bus/permissions.py.

accounts {{
{_account("CONTROL", found)}
{_account("EDGE", found)}
}}
"""


def quoted(text: str) -> str:
    """`text` as a string of the configuration; raises `ResplitError(INVALID_REQUEST)` for control characters."""
    if not text.isprintable():
        message = f"{text!r} has characters that cannot stand in a configuration; choose another"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _account(account: Account, logins: Sequence[Login]) -> str:
    asked = asked_of_control().items()
    control = account == "CONTROL"
    heard, other = (HEARD_IN_CONTROL, "EDGE") if control else (HEARD_AT_THE_EDGE, "CONTROL")
    told = HEARD_AT_THE_EDGE if control else HEARD_IN_CONTROL
    exports = [f"{{ stream: {quoted(subject)} }}" for subject in told]
    imports = [f"{{ stream: {{ account: {other}, subject: {quoted(subject)} }} }}" for subject in heard]
    if control:
        exports += [f"{{ service: {quoted(there)} }}" for _, there in asked]
    else:
        imports += [
            f"{{ service: {{ account: {other}, subject: {quoted(there)} }}, to: {quoted(here)} }}"
            for here, there in asked
        ]
    users = [_user(login) for login in logins if ACCOUNT_OF[login.role] == account]
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


def _user(login: Login) -> str:
    may = allowed(login)
    return f"""\
    {{
      # {login.role} {login.name}
      nkey: {login.nkey}
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

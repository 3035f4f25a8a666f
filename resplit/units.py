"""PURE: what a service of this machine takes: its unit, its settings, its member's folder, and the commands between.

The units are those of `deploy/systemd`, which run as they are where Resplit lies in /opt/resplit; elsewhere the path of
the program is put in its place, and nothing else.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Literal, assert_never

from schemas.base import NAME_PATTERN, NAME_RULE
from schemas.errors import ErrorCode, ResplitError

ServiceRole = Literal["agent", "orchestrator", "gateway", "nats"]

PROGRAMS = PurePosixPath("/opt/resplit/bin")
"""Where the units as they ship look for `resplit` and `nats-server`."""
UNITS, SETTINGS, STATE = Path("/etc/systemd/system"), Path("/etc/resplit"), Path("/var/lib/resplit")
USERS_FILE, USERS = Path("/etc/sysusers.d/resplit.conf"), "resplit.sysusers"
USER, NATS_USER = "resplit", "nats"
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What the units do not let a service see."""
RESERVED = re.compile(r"models|gateway|watch|keys|keys-.*")
"""Names of folders beside the stores of agents."""

TEMPLATES: Mapping[ServiceRole, str] = {
    "agent": "resplit-agent@.service",
    "orchestrator": "resplit-orchestrator.service",
    "gateway": "resplit-gateway.service",
    "nats": "nats-server.service",
}
SOCKET, SOCKET_LISTENS = "resplit-gateway.socket", "ListenStream=127.0.0.1:8000"
"""Where a gateway is reached: the unit beside its own, and the line of it that says so."""
OPTIONS_IN: Mapping[ServiceRole, str] = {
    "agent": "RESPLIT_AGENT_OPTIONS",
    "orchestrator": "RESPLIT_ORCHESTRATOR_OPTIONS",
    "gateway": "RESPLIT_GATEWAY_OPTIONS",
}


@dataclass(frozen=True)
class Service:
    """What is to run here."""

    role: ServiceRole
    name: str | None
    """Of an agent."""

    @property
    def unit(self) -> str:
        """The unit to start."""
        template = TEMPLATES[self.role]
        return template if self.name is None else template.replace("@.", f"@{self.name}.")

    @property
    def settings(self) -> Path:
        """The file of what it is told."""
        return SETTINGS / (f"{self.role}.env" if self.name is None else f"{self.role}-{self.name}.env")

    @property
    def keys(self) -> Path:
        """The folder of the member that it runs as."""
        match self.role:
            case "agent":
                return STATE / f"keys-{self.name}"
            case "orchestrator":
                return STATE / "keys"
            case "gateway" | "nats":
                return STATE / "gateway"
            case _:
                assert_never(self.role)


@dataclass(frozen=True)
class Write:
    """A file with its content."""

    path: Path
    content: bytes = field(repr=False)
    mode: int = 0o644
    group: str | None = None
    """Whose it is besides root's."""
    is_yours: bool = False
    """Whether people change it: then it is left as it is, and that is said."""


@dataclass(frozen=True)
class Join:
    """A member's folder, made of its bundle."""

    folder: Path
    bundle: bytes = field(repr=False)
    role: str
    name: str | None
    """Whom the bundle has to be of; None: of anyone of that role."""


@dataclass(frozen=True)
class Run:
    """A command."""

    command: tuple[str, ...]


Step = Write | Join | Run


@dataclass(frozen=True)
class Given:
    """What a service is made of."""

    template: str
    """The text of its unit as it ships,"""
    users: str
    """and of the users that the services run as."""
    socket: str
    """That of the unit by which a gateway is reached."""
    programs: PurePosixPath
    """The folder with `resplit`,"""
    nats_server: PurePosixPath
    """and the server's program."""
    url: str
    options: str = ""
    bundle: bytes | None = None
    watch: bytes | None = None
    """An observer's bundle, for a gateway."""
    server_files: Mapping[str, bytes] = field(default_factory=dict)
    """Of a NATS server, by name: its configuration, its logins, its certificate and so on."""


def service(role: ServiceRole, name: str | None) -> Service:
    """The service that is meant; raises `ResplitError(INVALID_REQUEST)` for a name too many, too few, or bad."""
    if role != "agent":
        if name is not None:
            message = f"{name!r}: only an agent has a name of its own; say `resplit install-service {role}`"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")
        return Service(role, None)
    if name is None or re.fullmatch(NAME_PATTERN, name) is None:
        message = f"{name!r} cannot name an agent; {NAME_RULE}: `resplit install-service agent NAME`"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")
    if RESERVED.fullmatch(name):
        message = f"an agent called {name!r} would have its files where other services have theirs; enroll another name"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")
    return Service(role, name)


def steps(wanted: Service, given: Given, *, live: bool, start: bool) -> tuple[Step, ...]:
    """All that makes the service, in order. `live`: on the machine that runs, systemd is told; `start`: at once, and
    whenever the machine starts. Raises `ResplitError(INVALID_REQUEST)` for what cannot stand in the files."""
    found: list[Step] = [Write(USERS_FILE, given.users.encode())]
    if live:
        found.append(Run(("systemd-sysusers", str(USERS_FILE))))
    unit = rendered(given.template, given.programs, given.nats_server)
    found.append(Write(UNITS / TEMPLATES[wanted.role], unit.encode()))
    if wanted.role == "gateway":
        found.append(Write(UNITS / SOCKET, listening(given.socket, given.options).encode()))
    if wanted.role == "nats":
        found += _server_files(given.server_files)
    else:
        found.append(Write(wanted.settings, settings(wanted, given).encode(), 0o640, is_yours=True))
    if given.bundle is not None:
        role = "client" if wanted.role == "gateway" else wanted.role
        found.append(Join(wanted.keys, given.bundle, role, wanted.name))
    if given.watch is not None:
        found.append(Join(STATE / "watch", given.watch, "observer", None))
    if live:
        found.append(Run(("systemctl", "daemon-reload")))
        if start:
            # It is started when its server answers, which may be much later.
            found.append(Run(("systemctl", "enable", "--now", "--no-block", wanted.unit)))
    return tuple(found)


def rendered(template: str, programs: PurePosixPath, nats_server: PurePosixPath) -> str:
    """A unit with its program where that is; raises `ResplitError(INVALID_REQUEST)` where systemd could not read the
    path, or the unit would hide it."""
    for path in (programs, nats_server):
        if re.fullmatch(r"/[\w./+-]+", str(path)) is None:
            message = f"{str(path)!r} cannot stand in a unit; install into a whole path of letters, digits, and _./+-"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "prefix")
        if any(path.is_relative_to(hidden) for hidden in HIDDEN):
            message = f"{path} is hidden from services; install Resplit elsewhere, as into /opt/resplit"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "prefix")
    return template.replace(f"{PROGRAMS}/nats-server", str(nats_server)).replace(f"{PROGRAMS}/", f"{programs}/")


def listening(template: str, options: str) -> str:
    """The socket of a gateway, at the address that its options say; raises what `option_words` raises."""
    words = option_words(options)
    said = [word.removeprefix("--listen=") for word in words if word.startswith("--listen=")]
    said += [address for flag, address in pairwise(words) if flag == "--listen"]
    # systemd takes a port alone for every address, and an empty host for none.
    return template.replace(SOCKET_LISTENS, f"ListenStream={said[-1].removeprefix(':')}") if said else template


def settings(wanted: Service, given: Given) -> str:
    """The file of what a service is told; raises `ResplitError(INVALID_REQUEST)` for what cannot stand in it."""
    named = " ".join(filter(None, ("resplit install-service", wanted.role, wanted.name)))
    lines = [f"# Written by `{named}`; what you change here stays.", f"RESPLIT_URL={_checked('url', given.url)}"]
    options = given.options or ("--listen 127.0.0.1:8000" if wanted.role == "gateway" else "")
    lines.append(f"{OPTIONS_IN[wanted.role]}={_checked('options', options)}")
    if given.watch is not None:
        lines.append(f"RESPLIT_WATCH_KEYS={STATE / 'watch'}")
    return "\n".join(lines) + "\n"


def option_words(options: str) -> list[str]:
    """The words into which systemd splits them; raises `ResplitError(INVALID_REQUEST)` for what it would take apart."""
    return shlex.split(_checked("options", options))


def shown(found: Sequence[Step]) -> str:
    """What would be done, for people: every file with its text, but no keys."""
    return "".join(map(_shown, found))


def _shown(step: Step) -> str:
    match step:
        case Write(path, content, mode, group, is_yours):
            owner = "root" if group is None else f"root:{group}"
            more = ", kept as it is where you changed it" if is_yours else ""
            head = f"# write {path} ({mode:04o} {owner}{more})\n"
            return head + ("" if path.name.endswith(".key") else content.decode()) + "\n"
        case Join(folder, _, role, name):
            return f"# join as {role}{'' if name is None else f' {name}'} in {folder} (0700 {USER})\n\n"
        case Run(command):
            return f"# run\n{shlex.join(command)}\n\n"
        case _:
            assert_never(step)


def _server_files(files: Mapping[str, bytes]) -> list[Step]:
    folder = SETTINGS / "nats"
    secret = {name for name in files if name.endswith(".key")}
    return [
        Write(
            folder / name,
            content,
            0o640 if name in secret else 0o644,
            NATS_USER if name in secret else None,
            is_yours=name == "nats-server.conf",
        )
        for name, content in sorted(files.items())
    ]


def _checked(field: str, text: str) -> str:
    """`text` as a value that systemd reads as it stands."""
    if re.search(r"[\"'\\$\s]", text.replace(" ", "")) or not text.isprintable():
        message = (
            f"{text!r} has characters that systemd reads otherwise in a file of settings; write that file yourself"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, field)
    return text

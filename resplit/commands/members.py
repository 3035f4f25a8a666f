"""Who belongs to a cluster: `init` founds one, `enroll`, `rotate` and `revoke` change it, `join` is for the machine of
a member, `certify` for its NATS server. (`resplit roster` is in `resplit.commands.roster`.)"""

import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resplit.commands.policy import ModelRules, SensitiveRules, changed
from resplit.options import AsJson, Keys
from resplit.output import print_json
from schemas.base import NAME_PATTERN, NAME_RULE, NodeId, SiteId, called
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from bus.founding import Holder
    from bus.server_certificate import ServerCertificate
    from schemas.roster import Roster

RoleName = Literal["agent", "orchestrator", "operator", "observer", "archivist", "client"]
TierName = Literal["trusted", "edge"]
DAYS = 365
EXPIRES_SOON = timedelta(days=30)
RELOAD = "carry {files} to the NATS server's machine, and there: nats-server --signal reload"

SIGN = "resplit roster sign {pending} --cluster {cluster} --root root-N.key"
PUBLISH = "resplit roster publish --cluster {cluster} --keys OPERATOR"

Cluster = Annotated[
    Path,
    typer.Option(
        "--cluster",
        envvar="RESPLIT_CLUSTER",
        help="The cluster's folder, made with `resplit init`.",
        callback=lambda path: path.expanduser(),
    ),
]
Roots = Annotated[
    list[Path] | None,
    typer.Option("--root", help="A holder's root-N.key, once for each who signs; default: those in the cluster."),
]
Locked = Annotated[bool, typer.Option("--locked", help="The holders' files have passphrases: ask for them.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        help="A name or an address at which members reach the NATS server, once for each. Its certificate is for "
        "these, and for loopback.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="The bundle to write; default: NODE.bundle here.")]
Member = Annotated[str, typer.Argument(help="The member's name.", metavar="NODE")]


def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make. Keep it off the cluster's machines.")],
    holders: Annotated[int, typer.Option(min=1, max=16, help="How many people hold a key of the root.")] = 1,
    threshold: Annotated[int, typer.Option(min=1, max=16, help="How many of them it takes to sign.")] = 1,
    locked: Locked = False,
    sensitive: SensitiveRules = None,
    model: ModelRules = None,
    host: Hosts = None,
    as_json: AsJson = False,
) -> None:
    """Found a cluster: the keys of its root, its certificate authority, and the configuration and the certificate of
    its NATS server. It has no members yet, and the server lets nobody in. Without --host, it is for this machine."""
    from bus.founding import found_cluster  # noqa: PLC0415
    from bus.natsconf import LOGINS_FILE, SERVER_FILE  # noqa: PLC0415
    from bus.server_certificate import (  # noqa: PLC0415
        SERVER_CERTIFICATE,
        SERVER_KEY,
        is_host,
        read_server_certificate,
    )
    from natstls.contexts import AUTHORITY  # noqa: PLC0415
    from schemas.roster import Policy  # noqa: PLC0415

    policy = changed(Policy(), sensitive or (), model or ())
    phrases = [ask_passphrase(f"root-{number}.key", confirm=True) for number in range(holders)] if locked else []
    folder = folder.expanduser()
    root = found_cluster(
        folder,
        now=now(),
        holders=holders,
        threshold=threshold,
        passphrases=phrases,
        policy=policy,
        hosts=[name for name in (socket.gethostname(),) if is_host(name)] if host is None else host,
    )
    if as_json:
        told = {"cluster": root.cluster, "folder": str(folder), "holders": holders, "threshold": threshold}
        print_json({**told, "hosts": read_server_certificate(folder).hosts})
        return
    print(f"{folder}: cluster {root.cluster}, {threshold} of {holders} holders sign")
    if holders > 1:
        print("  give each holder one root-N.key and delete it here")
    print(f"  for the NATS server's machine, side by side, from {folder}:")
    print(f"    {SERVER_FILE}, {LOGINS_FILE}, {AUTHORITY}, {SERVER_CERTIFICATE}, and {SERVER_KEY}, which is secret")
    print(f"  {certified_for(read_server_certificate(folder))}")
    print(f"    another name or address: resplit certify --host HOST --cluster {folder}")
    print(f"  next: resplit enroll orchestrator --role orchestrator --cluster {folder}")


def certify(
    cluster: Cluster, host: Hosts = None, root: Roots = None, locked: Locked = False, as_json: AsJson = False
) -> None:
    """Make the NATS server's certificate anew, before it ends or for other hosts. Without --host, for the same."""
    from bus.server_certificate import SERVER_CERTIFICATE, SERVER_KEY, read_server_certificate  # noqa: PLC0415
    from bus.server_certificate import certify as certified  # noqa: PLC0415

    hosts = read_server_certificate(cluster).hosts if host is None else host
    found = certified(cluster, hosts, holders_of(cluster, root, locked)[0].authority, now=now())
    if as_json:
        print_json({"hosts": found.hosts, "until": found.not_after.isoformat()})
        return
    print(certified_for(found))
    print(f"  {RELOAD.format(files=f'{cluster / SERVER_CERTIFICATE} and {SERVER_KEY}')}   (nobody is disturbed)")


def enroll(
    node: Member,
    cluster: Cluster,
    tier: Annotated[TierName | None, typer.Option(help="Of an agent: whether it may hold sensitive blocks.")] = None,
    role: Annotated[RoleName, typer.Option(help="What it is.")] = "agent",
    home: Annotated[
        str | None,
        typer.Option(
            help="The site that is its home: whose deployments an orchestrator steers, whose trail an agent writes. "
            "Default: the hub.",
            metavar="SITE",
        ),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long it belongs.")] = DAYS,
    root: Roots = None,
    locked: Locked = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Make NODE a member: writes its bundle, which `resplit join` uses on its machine. The bundle holds its private
    keys: carry it yourself, and delete it afterwards."""
    from bus.enrolment import enrol  # noqa: PLC0415
    from bus.identity import orchestrator_of  # noqa: PLC0415

    _check_name(node)
    at = None if home is None else SiteId(home)
    if role == "orchestrator" and node != (called_there := orchestrator_of(at)):
        message = (
            f"the orchestrators of {called(at)} are one member, which is called {called_there!r}; all have its keys"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "node")
    if role == "agent" and tier is None:
        message = "an agent is `--tier trusted` (it may see sensitive blocks) or `--tier edge` (it may not)"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "tier")
    holders = holders_of(cluster, root, locked)
    found = enrol(cluster, NodeId(node), role, tier, timedelta(days=days), holders, now=now(), home=at)
    _bundled(node, found, cluster, out, as_json)


def rotate(
    node: Member,
    cluster: Cluster,
    root: Roots = None,
    locked: Locked = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Give NODE new keys: writes its new bundle. The old keys are void wherever the new roster has arrived, and at the
    NATS server once it has the new logins."""
    from bus.enrolment import rotate as renewed  # noqa: PLC0415

    found = renewed(cluster, NodeId(node), holders_of(cluster, root, locked), now=now())
    _bundled(node, found, cluster, out, as_json)


def revoke(node: Member, cluster: Cluster, root: Roots = None, locked: Locked = False, as_json: AsJson = False) -> None:
    """Take NODE out of the cluster. It is out wherever the new roster has arrived: publish it. The NATS server cuts it
    off once it has the new logins."""
    from bus.enrolment import revoke as taken_out  # noqa: PLC0415

    roster = taken_out(cluster, NodeId(node), holders_of(cluster, root, locked), now=now())
    say_changed(roster, cluster, f"{node} is revoked", as_json)


def join(
    bundle: Annotated[Path, typer.Argument(help="What `resplit enroll` or `resplit rotate` wrote.")],
    keys: Keys,
    roster: Annotated[
        Path | None, typer.Option(help="The roster that more holders have signed since, where it takes several.")
    ] = None,
    server_authority: Annotated[
        Path | None,
        typer.Option(
            help="Where the NATS server has its certificate from others: the PEM file of whom it has it from, as "
            "/etc/ssl/certs/ca-certificates.crt. Default: the cluster's own authority."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a member's keys in place on its machine, after everything in BUNDLE was verified."""
    from bus.joining import join as joined  # noqa: PLC0415
    from bus.joining import with_roster  # noqa: PLC0415

    data = read_given(bundle, "bundle")
    if roster is not None:
        data = with_roster(data, read_given(roster, "roster"))
    authorities = None if server_authority is None else read_given(server_authority, "server-authority")
    found = joined(data, keys, now(), authorities)
    member = found.member
    if as_json:
        told = {"name": member.name, "role": member.role, "tier": member.tier, "until": member.not_after.isoformat()}
        print_json({**told, "cluster": found.roster.cluster, "keys": str(keys)})
        return
    print(f"{keys}: {_titled(member.role, member.tier)} {member.name} of cluster {found.roster.cluster}")
    print(f"  delete {bundle} now: it holds the private keys")
    nexts = {
        "agent": f"resplit agent {member.name} --keys {keys}",
        "orchestrator": f"resplit orchestrator --keys {keys}",
        "client": f"export RESPLIT_CLIENT_KEYS={keys}",
    }
    print(f"  next: {nexts.get(member.role, f'export RESPLIT_KEYS={keys}')}")


def certified_for(server: "ServerCertificate") -> str:
    """What is said of the NATS server's certificate."""
    soon = "" if server.not_after - now() > EXPIRES_SOON else "; renew it: resplit certify"
    return f"the NATS server's certificate is for {', '.join(server.hosts)}, until {day(server.not_after)}{soon}"


def _bundled(node: str, data: bytes, cluster: Path, out: Path | None, as_json: bool) -> None:
    from bus.cluster_folder import PENDING  # noqa: PLC0415
    from bus.natsconf import LOGINS_FILE  # noqa: PLC0415
    from bus.remembered import PRIVATE, write_durably  # noqa: PLC0415

    path = Path(f"{node}.bundle") if out is None else out.expanduser()
    write_durably(path, data, PRIVATE)
    pending = cluster / PENDING
    if as_json:
        print_json({"name": node, "bundle": str(path), "pending": str(pending) if pending.exists() else None})
        return
    print(f"{path}: the keys of {node}; take it to its machine yourself")
    if pending.exists():
        print(f"  other holders must sign first: {SIGN.format(pending=pending, cluster=cluster)}")
    else:
        print(f"  there:  resplit join {path.name} --keys FOLDER")
        print(f"  server: {RELOAD.format(files=cluster / LOGINS_FILE)}   (it lets {node} in)")
        print(f"  here:   {PUBLISH.format(cluster=cluster)}   (members that run hear of it)")


def say_changed(roster: "Roster", cluster: Path, what: str, as_json: bool) -> None:
    """That `what` was done in `roster`, or waits for other holders, and what is to be done next."""
    from bus.cluster_folder import PENDING  # noqa: PLC0415
    from bus.natsconf import LOGINS_FILE  # noqa: PLC0415

    pending = cluster / PENDING
    if as_json:
        print_json({"version": roster.version, "pending": str(pending) if pending.exists() else None})
    elif pending.exists():
        print(f"{what} once other holders have signed: {SIGN.format(pending=pending, cluster=cluster)}")
    else:
        print(f"{what} in roster {roster.version}; now {RELOAD.format(files=cluster / LOGINS_FILE)}")
        print(f"  and then: {PUBLISH.format(cluster=cluster)}   (members that run hear of it)")


def holders_of(cluster: Path, roots: list[Path] | None, locked: bool) -> "list[Holder]":
    """Those who sign: of the files given, or of all that lie in the cluster's folder."""
    from bus.founding import load_holder  # noqa: PLC0415

    paths = sorted(cluster.glob("root-*.key")) if roots is None else [path.expanduser() for path in roots]
    if not paths:
        message = f"{cluster} holds no root-N.key; bring the file of a holder with --root"
        if not cluster.exists():
            message = f"there is no folder {cluster}; `resplit init` makes a cluster's"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "root")
    return [load_holder(path, ask_passphrase(path.name) if locked else None) for path in paths]


def ask_passphrase(name: str, confirm: bool = False) -> str:
    """The passphrase of a holder's file."""
    asked: str = typer.prompt(f"passphrase of {name}", hide_input=True, confirmation_prompt=confirm)
    return asked


def _check_name(node: str) -> None:
    if re.fullmatch(NAME_PATTERN, node) is None:
        message = f"{node!r} cannot name a member; {NAME_RULE}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "node")


def read_given(path: Path, field: str) -> bytes:
    """A file that was named on the command line."""
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"cannot read {path}: {error.strerror}", field) from error


def _titled(role: str, tier: str | None) -> str:
    return role if tier is None else f"{tier} {role}"


def day(at: datetime) -> str:
    """A date, where whoever reads it is."""
    return at.astimezone().date().isoformat()


def now() -> datetime:
    """The time, by the clock of this machine."""
    return datetime.now(UTC)

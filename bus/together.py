"""A cluster whose members are all on one machine: what the demo runs, and what tests do."""

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bus.enrolment import enrol, renew, rotate
from bus.folders import ROSTER
from bus.founding import found_cluster, load_holder
from bus.identity import ORCHESTRATOR, read_roster
from bus.joining import join, with_roster
from bus.remembered import PUBLIC, write_durably
from bus.server_certificate import certify, read_server_certificate
from schemas.base import Home, NodeId
from schemas.roster import Policy, Role, TrustTier

CLUSTER = "cluster"
"""The folder of the root, among those of the members."""
OPERATOR, CLIENT, OBSERVER = NodeId("operator"), NodeId("client"), NodeId("observer")
LIFETIME = timedelta(days=3600)
RENEWED_BEFORE = timedelta(days=30)
"""What expires within this is renewed."""


def make_members(
    folder: Path,
    agents: Iterable[NodeId],
    edge: Collection[NodeId] = (),
    policy: Policy | None = None,
    hosts: Sequence[str] = (),
) -> None:
    """Found a cluster in `folder` and join an orchestrator, an operator, a client, an observer and each of `agents` to
    it, each in a folder of its name there. All agents are trusted but those in `edge`; `hosts`: where they reach the
    NATS server, beside loopback.

    The root's key lies beside them unencrypted: whoever has the machine has the cluster.
    """
    now = datetime.now(UTC)
    cluster = folder / CLUSTER
    found_cluster(cluster, now=now, policy=policy, hosts=hosts)
    roots = [load_holder(cluster / "root-0.key")]
    members: list[tuple[NodeId, Role, TrustTier | None]] = [
        (ORCHESTRATOR, "orchestrator", None),
        (OPERATOR, "operator", None),
        (CLIENT, "client", None),
        (OBSERVER, "observer", None),
        *((name, "agent", "edge" if name in edge else "trusted") for name in agents),
    ]
    bundles = {name: enrol(cluster, name, role, tier, LIFETIME, roots, now=now) for name, role, tier in members}
    # Each joins with the roster that names all, rather than be told of every other: a file that is durable takes the
    # disk milliseconds.
    roster = (cluster / ROSTER).read_bytes()
    for name, bundle in bundles.items():
        join(with_roster(bundle, roster), folder / name, now)


def add_member(folder: Path, name: NodeId, role: Role, tier: TrustTier | None, home: Home = None) -> bytes:
    """One more; the roster that says so, which every folder has now. Who runs already is to be sent it."""
    now, cluster = datetime.now(UTC), folder / CLUSTER
    roots = [load_holder(cluster / "root-0.key")]
    if read_roster(cluster).member(name) is None:
        bundle = enrol(cluster, name, role, tier, LIFETIME, roots, now=now, home=home)
    else:
        bundle = rotate(cluster, name, roots, now=now)  # whoever enrolled it was stopped before it joined
    join(bundle, folder / name, now)
    return _handed_out(folder)


def renew_if_due(folder: Path, host: str) -> None:
    """The roster and the server's certificate, before they expire: nobody else would renew them. The certificate too
    where it is not for `host`."""
    now, cluster = datetime.now(UTC), folder / CLUSTER
    root = load_holder(cluster / "root-0.key")
    if read_roster(cluster).expires_at - now < RENEWED_BEFORE:
        renew(cluster, [root], now=now)
        _handed_out(folder)
    server = read_server_certificate(cluster)
    if host not in server.hosts or server.not_after - now < RENEWED_BEFORE:
        certify(cluster, (host,), root.authority, now=now)


def _handed_out(folder: Path) -> bytes:
    """The roster, which every member's folder has now."""
    roster = (folder / CLUSTER / ROSTER).read_bytes()
    for other in folder.iterdir():
        if other.name != CLUSTER:
            write_durably(other / ROSTER, roster, PUBLIC)
    return roster

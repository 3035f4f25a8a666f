"""A cluster whose members are all on one machine: what the demo runs, and what tests do."""

from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bus.enrolment import enrol
from bus.founding import found_cluster, load_holder
from bus.identity import ORCHESTRATOR
from bus.joining import ROSTER, join
from bus.remembered import PUBLIC, write_durably
from schemas.base import NodeId
from schemas.roster import Policy, Role, TrustTier

CLUSTER = "cluster"
"""The folder of the root, among those of the members."""
OPERATOR = NodeId("operator")
LIFETIME = timedelta(days=3600)


def make_members(
    folder: Path, agents: Iterable[NodeId], edge: Collection[NodeId] = (), policy: Policy | None = None
) -> None:
    """Found a cluster in `folder` and join an orchestrator, an operator and each of `agents` to it, each in a folder
    of its name there. All agents are trusted but those in `edge`.

    The root's key lies beside them unencrypted: whoever has the machine has the cluster.
    """
    found_cluster(folder / CLUSTER, now=datetime.now(UTC), policy=policy)
    add_member(folder, ORCHESTRATOR, "orchestrator", None)
    add_member(folder, OPERATOR, "client", None)
    for name in agents:
        add_member(folder, name, "agent", "edge" if name in edge else "trusted")


def add_member(folder: Path, name: NodeId, role: Role, tier: TrustTier | None) -> bytes:
    """One more; the roster that says so, which every folder has now. Who runs already is to be sent it."""
    now = datetime.now(UTC)
    roots = [load_holder(folder / CLUSTER / "root-0.key")]
    join(enrol(folder / CLUSTER, name, role, tier, LIFETIME, roots, now=now), folder / name, now)
    roster = (folder / CLUSTER / ROSTER).read_bytes()
    for other in folder.iterdir():
        if other.name not in (CLUSTER, name):
            write_durably(other / ROSTER, roster, PUBLIC)
    return roster

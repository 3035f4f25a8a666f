"""What the processes of a real cluster signed and said to each other, and the folders of those who can verify it."""

import asyncio
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nats.aio.msg import Msg
from pydantic import BaseModel

import resplit.demo
from benchmarks.faults.owned import OwnedCluster
from bus.folders import ROSTER
from bus.identity import ORCHESTRATOR, Identity, Keys, load_identity
from bus.streams import stored_messages
from bus.together import make_members
from resplit import Client, control
from schemas import subjects
from schemas.audit import AuditEvent
from schemas.base import DeploymentName, NodeId
from schemas.beacon import Beacon
from schemas.capacity import HEARTBEAT_IN_PLAN_S
from schemas.control import DeployRequest
from schemas.deployment import Sensitive, Settings, Stage
from schemas.envelope import (
    AUDIT_TYPE,
    BEACON_TYPE,
    HEARTBEAT_TYPE,
    LEADER_TYPE,
    PLAN_TYPE,
    RECEIPT_TYPE,
    STAGING_TYPE,
    open_envelope,
    seal,
)
from schemas.errors import ResplitError
from schemas.heartbeat import Heartbeat
from schemas.leader import Leadership
from schemas.plan import Receipt
from schemas.roster import Policy
from schemas.section import SealedEvent
from schemas.staging import Staging

N0, N1 = NodeId("n0"), NodeId("n1")
ADDER = DeploymentName("adder")
SERVING_S = 90.0
THERE_AND_BACK = (Stage(node=N0, first=0, last=0), Stage(node=N1, first=1, last=8), Stage(node=N0, first=9, last=9))
DEPLOYED = DeployRequest(name=ADDER, model="adder", placement=THERE_AND_BACK, settings=Settings(context_tokens=64))
KINDS: Mapping[str, type[BaseModel]] = {
    PLAN_TYPE: SealedEvent,
    LEADER_TYPE: Leadership,
    RECEIPT_TYPE: Receipt,
    HEARTBEAT_TYPE: Heartbeat,
    STAGING_TYPE: Staging,
    BEACON_TYPE: Beacon,
    AUDIT_TYPE: AuditEvent,
}
"""Every type of envelope, and what it holds."""


@dataclass(frozen=True)
class Recording:
    """One deployment, from its wish to its end, on two agents of which n1 is at the edge."""

    keys: Path
    """The folders of the cluster and its members."""
    said: tuple[tuple[str, bytes], ...]
    """Every message under `resplit.v1`, with its subject, in the order of the bus."""
    roster: bytes

    def identity(self, name: NodeId) -> Identity:
        return load_identity(self.keys / name, name)

    def envelopes(self, identity: Identity) -> dict[str, tuple[bytes, ...]]:
        """By payload type: every envelope that its own reader takes, each once."""
        found: dict[str, dict[bytes, None]] = {kind: {} for kind in KINDS}
        for _, data in self.said:
            for kind, held in KINDS.items():
                try:
                    open_envelope(data, held, kind, believed(identity, kind))
                except ResplitError:
                    continue
                found[kind][data] = None
        return {kind: tuple(data) for kind, data in found.items()}


def believed(identity: Identity, kind: str) -> Keys:
    """Whose signature counts under an envelope of this type, as production reads it."""
    if kind == AUDIT_TYPE:
        return identity.writers
    return identity.agents if kind in (RECEIPT_TYPE, HEARTBEAT_TYPE) else identity.orchestrators


def half_trusted(folder: Path, *others: NodeId, sensitive: Sensitive = "ends") -> OwnedCluster:
    """Two agents with the model that is shipped, and `others`: n1 is at the edge, and the root keeps what is sensitive,
    both ends of every deployment, from it."""
    return ruled(folder, Policy(sensitive={"*": sensitive}), *others)


def ruled(folder: Path, policy: Policy, *others: NodeId) -> OwnedCluster:
    """Two agents with the model that is shipped, n1 at the edge, and `others`, under this policy of the root's."""
    store = Path(shutil.copytree(resplit.demo.shipped_store(), folder / "store"))
    names = [N0, N1, *others]
    make_members(folder / "cluster" / "keys", names, edge=[N1], policy=policy)
    return OwnedCluster(folder / "cluster", store, agents=len(names), threads=1)


async def record(folder: Path) -> Recording:
    """Run a cluster of processes in `folder`, deploy, ask, move, remove; and keep everything that was said."""
    said: list[tuple[str, bytes]] = []

    async def note(message: Msg) -> None:
        said.append((message.subject, message.data))

    async with half_trusted(folder) as cluster:
        control_owner, edge_owner = await cluster.owner("CONTROL"), await cluster.owner("EDGE")
        for message in await stored_messages(control_owner.jetstream(), subjects.STREAM_PLANS, f"{subjects.ROOT}.>"):
            await note(message)  # who leads, and the roster: said before anybody listened
        for owner in (control_owner, edge_owner):
            await owner.subscribe(f"{subjects.ROOT}.>", cb=note)
        await control.deploy_and_wait(cluster.operator, DEPLOYED, SERVING_S)
        async with Client(cluster.url, keys=cluster.client_keys) as client:
            await client.complete(ADDER, "12+30=", max_tokens=4)
        await control.deploy_and_wait(cluster.operator, DEPLOYED.model_copy(update={"placement": None}), SERVING_S)
        await control.remove(cluster.operator, ADDER)
        await asyncio.sleep(HEARTBEAT_IN_PLAN_S)
        async with asyncio.timeout(SERVING_S):
            while not any(subject == subjects.BEACON for subject, _ in said):  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.1)
        await control_owner.drain()
        await edge_owner.drain()
    # So small a cluster is given no advice; this is what `orchestrator.staging` would send.
    keys = cluster.keys
    leader = load_identity(keys / ORCHESTRATOR, ORCHESTRATOR)
    advice = Staging(node=N0, term=1, number=1, issued_at=datetime.now(UTC))
    said.append((subjects.staging(N0), seal(advice, STAGING_TYPE, leader.name, leader.key)))
    return Recording(keys, tuple(said), (keys / N0 / ROSTER).read_bytes())

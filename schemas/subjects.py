"""Every subject, stream and bucket on the bus, in one place."""

from schemas.base import DeploymentName, Digest, Home, LifeId, NodeId, RequestId

ROOT = "resplit.v1"

# JetStream streams and key-value buckets.
STREAM_PLANS = "RESPLIT_PLANS"
STREAM_RECEIPTS = "RESPLIT_RECEIPTS"
STREAM_AUDIT = "RESPLIT_AUDIT"
STREAM_JOURNAL = "RESPLIT_JOURNAL"
BUCKET_DEPLOYMENTS = "resplit_deployments"
BUCKET_NODES = "resplit_nodes"
BUCKET_LEADER = "resplit_leader"

ALL_CAPACITY = f"{ROOT}.capacity.*"
ALL_PLANS = f"{ROOT}.plan.*"
ALL_RECEIPTS = f"{ROOT}.receipt.*"
ALL_STANDBYS = f"{ROOT}.standby.*"
ALL_AUDIT = f"{ROOT}.audit.>"
ALL_JOURNAL = f"{ROOT}.journal.*.*"
ALL_CANCEL = f"{ROOT}.cancel.*"
LEADER = f"{ROOT}.leader"
"""Signed word of each new leader (JetStream, in the stream of plans, where it fences the one before)."""
ROSTER = f"{ROOT}.roster"
"""Who belongs to the cluster, signed by its root (JetStream, in the stream of plans)."""
ROSTER_OF_HUB = f"{ROOT}.hub.roster"
"""The same as it is published at the hub, to those who steer at a site (core)."""
BEACON = f"{ROOT}.beacon"
"""What is newest, signed by the leader, every few seconds (core)."""
ROSTER_NEWEST = f"{ROSTER}.newest"
"""Asked for the newest roster, by those who follow no stream (core, queue group `ROSTER_QUEUE`)."""
CONTROL = f"{ROOT}.control"
INGRESS_QUEUE = "ingress"
BLOB_QUEUE = "holders"
ROSTER_QUEUE = "members"


def at_edge(home: Home, subject: str) -> str:
    """A subject of the control plane of `home` as those at the EDGE name it. A site's stand under the site's name
    there; among those who steer at a site they are called as at the hub."""
    return subject if home is None else f"{ROOT}.site.{home}{subject.removeprefix(ROOT)}"


def capacity(node: NodeId) -> str:
    """Signed heartbeat of one agent (core)."""
    return f"{ROOT}.capacity.{node}"


def infer(deployment: DeploymentName) -> str:
    """Requests to one deployment (core, queue group `INGRESS_QUEUE`)."""
    return f"{ROOT}.infer.{deployment}"


def cancel(request: RequestId) -> str:
    """Cancels one request wherever it is served (core)."""
    return f"{ROOT}.cancel.{request}"


def plan(deployment: DeploymentName) -> str:
    """Signed plan events of one deployment (JetStream)."""
    return f"{ROOT}.plan.{deployment}"


def staging(node: NodeId) -> str:
    """Signed word of the leader to one agent: what to have on its disk ahead of need (core)."""
    return f"{ROOT}.staging.{node}"


def receipt(node: NodeId) -> str:
    """Signed answers of one agent to plan events (JetStream)."""
    return f"{ROOT}.receipt.{node}"


def standby(orchestrator: NodeId) -> str:
    """An orchestrator that stands by says so (core, empty)."""
    return f"{ROOT}.standby.{orchestrator}"


def journal(deployment: DeploymentName, life: LifeId) -> str:
    """Accepted requests of one deployment in one life of an ingress, their tokens and ends (JetStream)."""
    return f"{ROOT}.journal.{deployment}.{life}"


def activation(node: NodeId) -> str:
    """Frames for one agent where no direct link exists (core)."""
    return f"{ROOT}.activation.{node}"


def audit(source: NodeId, kind: str) -> str:
    """Audit events of one process (JetStream)."""
    return f"{ROOT}.audit.{source}.{kind}"


def blob(digest: Digest) -> str:
    """Requests for a piece of one content-addressed file (core, queue group `BLOB_QUEUE`)."""
    return f"{ROOT}.blob.{digest}"


def blob_of_all(digest: Digest) -> str:
    """The same, of every holder at once: for a reader whom the one that was picked did not answer (core)."""
    return f"{ROOT}.blob.{digest}.all"


def control(verb: str) -> str:
    """Requests of operators to the orchestrator (core): `deploy`, `place`, `remove`, `drain`, `undrain`, `trust`,
    `status`, `explain`, `plan`, `where`."""
    return f"{CONTROL}.{verb}"

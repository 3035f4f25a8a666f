"""Every subject, stream and bucket on the bus, in one place."""

from schemas.base import DeploymentName, Digest, NodeId, RequestId

ROOT = "resplit.v1"

# JetStream streams and key-value buckets.
STREAM_PLANS = "RESPLIT_PLANS"
STREAM_RECEIPTS = "RESPLIT_RECEIPTS"
STREAM_AUDIT = "RESPLIT_AUDIT"
BUCKET_DEPLOYMENTS = "resplit_deployments"

ALL_CAPACITY = f"{ROOT}.capacity.*"
ALL_PLANS = f"{ROOT}.plan.*"
ALL_RECEIPTS = f"{ROOT}.receipt.*"
ALL_AUDIT = f"{ROOT}.audit.>"
ALL_CANCEL = f"{ROOT}.cancel.*"
CONTROL = f"{ROOT}.control"
INGRESS_QUEUE = "ingress"
BLOB_QUEUE = "holders"


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


def receipt(node: NodeId) -> str:
    """Signed answers of one agent to plan events (JetStream)."""
    return f"{ROOT}.receipt.{node}"


def activation(node: NodeId) -> str:
    """Frames for one agent where no direct link exists (core)."""
    return f"{ROOT}.activation.{node}"


def audit(source: NodeId, kind: str) -> str:
    """Audit events of one process (JetStream)."""
    return f"{ROOT}.audit.{source}.{kind}"


def blob(digest: Digest) -> str:
    """Requests for a piece of one content-addressed file (core, queue group `BLOB_QUEUE`)."""
    return f"{ROOT}.blob.{digest}"


def control(verb: str) -> str:
    """Requests of operators to the orchestrator: `deploy`, `remove`, `status`, `explain`, `plan` (core)."""
    return f"{CONTROL}.{verb}"

"""Capacity: what one agent can do and does, as it publishes it."""

from typing import Literal

from pydantic import AwareDatetime, Field

from schemas.base import DeploymentId, NodeName, Sha256, Value

HEARTBEAT_IN_PLAN_S = 1.0
HEARTBEAT_SPARE_S = 10.0
LOST_AFTER_S = 5.0
"""A node in a plan that is silent for this long is lost (`reliability-and-security.md`, section 2)."""


class Provider(Value):
    """An execution provider of ONNX Runtime on this node, with what a roofline needs of it."""

    name: Literal["cpu", "cuda"]
    device: str
    """The processor's or GPU's own name, for people."""
    flops_per_s: float = Field(gt=0)
    """Measured: a large fp32 matrix product through ONNX Runtime."""
    bytes_per_s: float = Field(gt=0)
    """Measured: the weights streamed per second by a matrix-vector product through ONNX Runtime."""


class BlockTime(Value):
    """Measured times of one block on this node."""

    model: Sha256
    block: int = Field(ge=0)
    decode_ms: float = Field(ge=0)
    """One step of one sequence (for a tensor model: one call of batch 1)."""
    prefill_ms_per_token: float = Field(ge=0)


class LinkEstimate(Value):
    """What this node measured towards a peer."""

    peer: NodeName
    rtt_ms: float = Field(ge=0)
    direct: bool
    """True over the direct TLS link, False over the bus."""
    goodput_bytes_per_s: float | None = Field(default=None, gt=0)
    """Payload per second that the link carried; None until something large enough passed."""


class HostedStage(Value):
    """Blocks this node has loaded for one epoch of one deployment."""

    deployment: DeploymentId
    epoch: int = Field(ge=1)
    model: Sha256
    blocks: tuple[int, ...]
    state: Literal["loading", "ready", "serving", "draining"]
    sequences: int = Field(ge=0)


class Capacity(Value):
    """One heartbeat. `sequence` grows with each one an agent process sends, starting at 0."""

    node: NodeName
    boot: str
    """Random per process: a node that restarted is not the node it was."""
    sequence: int = Field(ge=0)
    issued_at: AwareDatetime
    version: str
    link: str | None = None
    """`host:port` where peers reach this node directly, None if they cannot."""
    provider: Provider
    threads: int = Field(ge=1)
    memory_total_bytes: int = Field(ge=0)
    memory_free_bytes: int = Field(ge=0)
    """What new blocks and caches may take: free memory of the provider's device, less the reserve."""
    disk_free_bytes: int = Field(ge=0)
    load: float = Field(ge=0)
    """Share of the node's cores that is busy, 0 to 1."""
    pressure: float | None = Field(default=None, ge=0)
    """Linux PSI: per cent of the last 10 s in which some task waited for the CPU."""
    stages: tuple[HostedStage, ...] = ()
    block_times: tuple[BlockTime, ...] = ()
    links: tuple[LinkEstimate, ...] = ()
    models_on_disk: tuple[Sha256, ...] = ()
    """Models of which this node holds every block it was ever asked to."""

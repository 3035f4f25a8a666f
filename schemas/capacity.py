"""Capacity: what one agent can do and does, as it publishes it."""

from collections.abc import Iterable
from itertools import groupby
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, StringConstraints, model_validator

from schemas.base import NAME_PATTERN, DeploymentId, Digest, NodeName, Sha256, Value

BlockIndex = Annotated[int, Field(ge=0, lt=1 << 16)]
ThrottleReason = Literal["thermal", "power", "hardware"]
"""Why a device runs slower than it could; `hardware` is a slowdown whose cause it does not tell."""

Tier = Literal["edge", "cloud"]
HostedState = Literal["loading", "ready", "serving", "draining"]

HEARTBEAT_IN_PLAN_S = 1.0
HEARTBEAT_SPARE_S = 10.0
LOST_AFTER_S = 5.0
"""A node in a plan that is silent for this long is lost (docs/reliability.md, promises)."""


REFERENCE_CONTEXT_TOKENS = 128
"""The cache behind which a step is timed when a block is loaded; other contexts differ by a measured rate."""
MS_MAX = 1e9
"""Eleven days: nothing that is timed here takes as long. A figure without an upper bound, signed or not, would end
whoever computes with it in an overflow."""
BYTES_MAX = 1 << 56
TOKENS_MAX = 1 << 31
"""Of one request."""
COUNT_MAX = 1 << 40
"""Of what a process counted since it began."""
SUM_MAX = 1e15
"""Of milliseconds or money, likewise."""
FINISHED_MAX = 16
"""Finished requests in a heartbeat, the latest ones: a sample where more end in a second."""


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
    """Times of one block on this node: measured when it was loaded, and since then as its calls show them."""

    model: Sha256
    block: int = Field(ge=0)
    decode_ms: float = Field(ge=0, le=MS_MAX)
    """One step of one sequence behind `REFERENCE_CONTEXT_TOKENS` (for a tensor model: one call of batch 1)."""
    prefill_ms_per_token: float = Field(ge=0, le=MS_MAX)
    """Of a chunk of a prompt, beside `prefill_ms`."""
    prefill_ms: float = Field(default=0.0, ge=0, le=MS_MAX)
    """Of a chunk, however short it is."""
    decode_ms_per_row: float | None = Field(default=None, ge=0, le=MS_MAX)
    """What each sequence beyond `rows_min` adds to a step; None while nobody measured it."""
    rows_min: int = Field(default=1, ge=1, le=TOKENS_MAX)
    """Sequences up to which a step costs the same, as a lone one runs in company (decision 0005)."""
    decode_ms_per_context_token: float = Field(default=0.0, ge=0, le=MS_MAX)
    """What each token of a sequence's cache beyond `REFERENCE_CONTEXT_TOKENS` adds to a step: attention reads it."""


class LinkEstimate(Value):
    """What this node measured towards a peer that answered it lately.

    A peer that answers neither over its link nor over the bus has no estimate: that is a fault of the node (or of
    both roads). A fault of the edge alone is `up=False`.
    """

    peer: NodeName
    rtt_ms: float = Field(ge=0, le=MS_MAX)
    """Median round trip, over the road that `direct` names."""
    jitter_ms: float | None = Field(default=None, ge=0, le=MS_MAX)
    """Mean difference between successive round trips."""
    goodput_bytes_per_s: float | None = Field(default=None, gt=0)
    """Payload delivered per second in transfers long enough to tell; None before there was one."""
    direct: bool
    """True over the direct TLS link, False over the bus."""
    up: bool = True
    """False if the peer names a link address and answers over the bus, but not over its link: an edge fault."""


class LostPeer(Value):
    """A process of a peer that closed its links and of which the broker says that it does not listen any more."""

    node: NodeName
    boot: str


class RouteName(Value):
    """One route of one plan."""

    deployment: DeploymentId
    epoch: int = Field(ge=1)
    route: int = Field(ge=0)


class TaskCount(Value):
    """What became of requests of one task of a pipeline, among those of its deployment."""

    task: str = Field(max_length=63)
    arrived: int = Field(default=0, ge=0, le=COUNT_MAX)
    met: int = Field(default=0, ge=0, le=COUNT_MAX)
    missed: int = Field(default=0, ge=0, le=COUNT_MAX)


class StepCount(Value):
    """What a service of a pipeline took on a node, by the answers that came to this conductor."""

    service: str = Field(max_length=63)
    node: NodeName
    answers: int = Field(ge=0, le=COUNT_MAX)
    compute_ms: float = Field(ge=0, le=1e15)
    """Of all of them, in ONNX Runtime,"""
    compute_ms_squared: float = Field(ge=0, le=1e24)
    """and the sum of their squares."""


class CloudCount(Value):
    """What a cloud was asked, since the ingress' process began, and what came of it."""

    asked: int = Field(default=0, ge=0, le=COUNT_MAX)
    answered: int = Field(default=0, ge=0, le=COUNT_MAX)
    total_ms: float = Field(default=0.0, ge=0, le=SUM_MAX)
    """Of those answered: from asking to the answer, all together."""
    cost: float = Field(default=0.0, ge=0, le=SUM_MAX)
    """By the endpoint's prices."""


class Service(Value):
    """What became of requests of one deployment at this ingress since its process began."""

    deployment: DeploymentId
    arrived: int = Field(default=0, ge=0, le=COUNT_MAX)
    """Accepted, or refused for want of capacity; what came from another ingress is not counted again."""
    waiting: int = Field(default=0, ge=0, le=COUNT_MAX)
    """Accepted and not begun: now, while everything else here counts from the beginning."""
    sized: int = Field(default=0, ge=0, le=COUNT_MAX)
    """Of those the ones for text that were read, whether they were accepted or not,"""
    sized_prompt_tokens: int = Field(default=0, ge=0, le=COUNT_MAX)
    """their prompts,"""
    sized_max_tokens: int = Field(default=0, ge=0, le=COUNT_MAX)
    """and what they may say."""
    answered: int = Field(default=0, ge=0, le=COUNT_MAX)
    """Ended in text,"""
    answered_prompt_tokens: int = Field(default=0, ge=0, le=COUNT_MAX)
    """of these prompts,"""
    answered_max_tokens: int = Field(default=0, ge=0, le=COUNT_MAX)
    """and what they might have said;"""
    prompt_tokens: int = Field(default=0, ge=0, le=COUNT_MAX)
    """the tokens of their prompts that were computed, not kept of an earlier turn,"""
    output_tokens: int = Field(default=0, ge=0, le=COUNT_MAX)
    """and what they said."""
    met: int = Field(default=0, ge=0, le=COUNT_MAX)
    """Ended in output, and met every target of the deployment's class."""
    missed: int = Field(default=0, ge=0, le=COUNT_MAX)
    """Missed a target, ended in an error that is not the client's, or could not meet the deployment's deadline."""
    tasks: tuple[TaskCount, ...] | None = Field(default=None, max_length=64)
    """Of a pipeline: the same by task,"""
    steps: tuple[StepCount, ...] | None = Field(default=None, max_length=1024)
    """and what its services took."""
    cloud: CloudCount | None = None
    """Of one that a cloud answers for."""


class FinishedRequest(Value):
    """What a request met that ran over one route of one plan from its beginning to its end, and the load it met."""

    number: int = Field(ge=0)
    """Grows with each one of this process, so that a reader counts it once."""
    deployment: DeploymentId
    epoch: int = Field(ge=1)
    route: int = Field(ge=0)
    prompt_tokens: int = Field(ge=1, le=TOKENS_MAX)
    """Those that were computed: not what was kept of an earlier turn."""
    cached_tokens: int = Field(default=0, ge=0, le=TOKENS_MAX)
    output_tokens: int = Field(ge=1, le=TOKENS_MAX)
    ahead_tokens: int = Field(default=0, ge=0, le=TOKENS_MAX)
    """Of other prompts that were not computed yet when this one was admitted."""
    batch: float = Field(ge=1, le=TOKENS_MAX)
    """Sequences that shared its steps on average, itself included."""
    started_ms: float = Field(ge=0, le=MS_MAX)
    """How long before it ended it was admitted: predictions of that time are what it is held against."""
    ttft_ms: float = Field(gt=0, le=MS_MAX)
    """From its admission to its first token; what it waited for a free slot is not in it."""
    tpot_ms: float | None = Field(default=None, gt=0, le=MS_MAX)
    """None for an answer of one token."""


class HostedStage(Value):
    """Blocks this node has loaded for one epoch of one deployment."""

    deployment: DeploymentId
    epoch: int = Field(ge=1)
    model: Sha256
    blocks: tuple[int, ...]
    state: HostedState
    sequences: int = Field(ge=0, le=COUNT_MAX)
    """That run on them. Those that have ended, whose caches are kept for the next turn of a conversation, do not."""


class StoredBlocks(Value):
    """Blocks of one model whose files are on a disk, or are to be, as ranges with both ends included."""

    model: Sha256
    ranges: tuple[tuple[BlockIndex, BlockIndex], ...] = Field(default=(), max_length=1024)

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        ends = [end for ends in self.ranges for end in ends]
        if ends != sorted(ends):
            raise ValueError(f"ranges of blocks that do not ascend: {self.ranges}")
        return self

    @classmethod
    def of(cls, model: Digest, blocks: Iterable[int]) -> Self:
        """These blocks, in any order, as few ranges."""
        numbered = enumerate(sorted(set(blocks)))
        runs = [[block for _, block in run] for _, run in groupby(numbered, key=lambda pair: pair[1] - pair[0])]
        return cls(model=model, ranges=tuple((run[0], run[-1]) for run in runs))

    @property
    def blocks(self) -> frozenset[int]:
        return frozenset(block for first, last in self.ranges for block in range(first, last + 1))


class Guidance(Value):
    """What keeps a node from knowing that it follows the newest plans and the newest roster."""

    silent_s: float | None = Field(default=None, ge=0, le=MS_MAX)
    """For how long no valid beacon of the leader has come; None while they come."""
    withheld: tuple[DeploymentId, ...] = Field(default=(), max_length=1024)
    """Deployments of which a beacon named an event that did not reach the node, or that it refused."""
    withheld_roster: int | None = Field(default=None, ge=1)
    """The version of a roster of which the same is true."""


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
    tier: Tier = "edge"
    """`cloud`: a rented machine farther away. Plans use it where the edge cannot do without, or it is worth the price;
    it is not trusted unless an operator says so."""
    price_per_hour: float = Field(default=0.0, ge=0)
    """What keeping the node in a plan costs, in whatever currency all nodes are priced in."""
    threads: int = Field(ge=1)
    memory_total_bytes: int = Field(ge=0, le=BYTES_MAX)
    memory_free_bytes: int = Field(ge=0, le=BYTES_MAX)
    """What new blocks and caches may take: free memory of the provider's device, less the reserve."""
    disk_free_bytes: int = Field(ge=0, le=BYTES_MAX)
    disk_models_bytes: int | None = Field(default=None, ge=0, le=BYTES_MAX)
    """What files of models may take of its disk at most, all others gone."""
    load: float = Field(ge=0)
    """Share of the node's cores that is busy, 0 to 1."""
    pressure: float | None = Field(default=None, ge=0)
    """Linux PSI: per cent of the last 10 s in which some task waited for the CPU."""
    memory_pressure: float | None = Field(default=None, ge=0, le=100)
    """Linux PSI: per cent of the last 10 s in which some task waited for memory."""
    io_pressure: float | None = Field(default=None, ge=0, le=100)
    """Linux PSI: per cent of the last 10 s in which some task waited for a disk."""
    gpu_load: float | None = Field(default=None, ge=0, le=1)
    """Share of the last sampling period in which the GPU ran a kernel; None without a GPU in use."""
    throttled: tuple[ThrottleReason, ...] | None = None
    """What slows the device that computes (the GPU in use, else the processor): nothing if empty, None if unknown."""
    temperature_c: float | None = Field(default=None, ge=-100, le=300)
    """Of the device that computes; the hottest sensor of a processor."""
    power_w: float | None = Field(default=None, ge=0)
    """Drawn by the device that computes: a GPU says it, a processor's is the mean since the last heartbeat."""
    energy_j: float | None = Field(default=None, ge=0)
    """A counter of that device's energy: its differences count, and one that falls was started anew."""
    disk_read_bytes_per_s: float | None = Field(default=None, gt=0)
    """What the disk of the store gave when it was last read in earnest; None before that."""
    stages: tuple[HostedStage, ...] = ()
    block_times: tuple[BlockTime, ...] = ()
    links: tuple[LinkEstimate, ...] = ()
    lost_peers: tuple[LostPeer, ...] = Field(default=(), max_length=1024)
    """Processes that this node found gone; a node that is back is named no more."""
    stalled: tuple[RouteName, ...] = Field(default=(), max_length=1024)
    """Routes on which this ingress waits for a step longer than it should: some node of them may hang."""
    service: tuple[Service, ...] = Field(default=(), max_length=1024)
    """Counters, one for each deployment of which a request ended here; their differences count."""
    on_disk: tuple[StoredBlocks, ...] = Field(default=(), max_length=1024)
    """Blocks whose files this node has, of every model that it was asked to run or to keep ready."""
    machine: str | None = Field(default=None, max_length=64)
    """The same for processes under one kernel; None if unknown."""
    cores: tuple[int, ...] = Field(default=(), max_length=4096)
    """The processors of that machine that this process may run on."""
    frame_ms: float | None = Field(default=None, ge=0, le=MS_MAX)
    """What a frame costs this node beside waiting and computing: from thread to thread, and choosing tokens."""
    slowdown: float | None = Field(default=None, gt=0)
    """How many times longer than at load time a step takes by `block_times`; None where nothing has run, and the times
    are those of load time. It is the load of the node and of whatever shares its processors."""
    contention: float | None = Field(default=None, ge=1, le=1e6)
    """How many times longer than at its best a small calculation takes here while next to nothing runs: what others
    take of the device, by which the times of blocks are longer than when they were loaded. None while something runs,
    or where it was not measured."""
    finished: tuple[FinishedRequest, ...] = Field(default=(), max_length=FINISHED_MAX)
    """Requests that this ingress brought to their end in the last seconds."""
    clouds: tuple[Annotated[str, StringConstraints(pattern=NAME_PATTERN)], ...] = Field(default=(), max_length=64)
    """Endpoints outside the cluster that this node can ask, by name."""
    guidance: Guidance | None = None
    """None where beacons come and nothing that they name is missing."""

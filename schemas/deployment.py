"""What operators want: a model under a name that clients address, how it is to be run, which nodes to spare."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic.json_schema import SkipJsonSchema

from schemas.base import NAME_PATTERN, DeploymentId, NodeId, NodeName, Sha256, Value
from schemas.slo import Slo

DEFAULT_CHUNK_TOKENS = 128


class Stage(Value):
    """Blocks `first` to `last`, both included, on one node."""

    node: NodeName
    first: int = Field(ge=0)
    last: int = Field(ge=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.first > self.last:
            raise ValueError(f"a stage cannot run from block {self.first} to block {self.last}")
        return self

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)


Chain = tuple[Stage, ...]
"""The stages of one route, in the order of their blocks."""
Placement = tuple[Chain, ...]
"""A chain for each route of a plan."""
DeepEnds = Annotated[str, StringConstraints(pattern=r"^ends:[1-9][0-9]{0,3}$")]
Sensitive = tuple[Annotated[int, Field(ge=0)], ...] | Literal["ends", "all"] | DeepEnds
"""Blocks that only trusted nodes may hold, `ends` being the first and the last: prompts enter there, tokens leave.
`ends:2` are those and two more at either end; of a model that has no others, all."""

ROUTES_MAX = 16
"""A plan of more routes is several deployments."""


class Settings(Value):
    """How a deployment runs; part of every plan, since outputs depend on `chunk_tokens`."""

    chunk_tokens: int = Field(default=DEFAULT_CHUNK_TOKENS, ge=1, le=4096)
    """Prefill chunk: boundaries are absolute multiples of this, never load-dependent."""
    context_tokens: int = Field(default=2048, ge=2)
    """The longest sequence (prompt and output) served; at most the model's own context."""
    max_sequences: int = Field(default=32, ge=1, le=1024)
    """Sequences that run at once; each has a KV slot on every node of its route."""
    max_queued: int = Field(default=64, ge=0, le=100_000)
    """Accepted requests that may wait for a slot; one more is refused as `overloaded`."""
    pipeline_depth: int = Field(default=1, ge=1, le=64)
    """Decode batches, and prefill chunks, in flight at once: about one per stage on separate machines, one on
    shared cores."""
    recovery: Literal["identical", "fast"] = "identical"
    """How a sequence whose caches are lost is computed anew. `identical`: in the calls that made it, token by token,
    so that its tokens are those of an undisturbed run. `fast`: what came out of it is prefilled with its prompt, which
    rounds otherwise; its answer says so (`Usage.recovered`)."""
    batch_invariant: bool = True
    """Whether a sequence's tokens may never depend on who shares its batch. Where ONNX Runtime has a kernel of its
    own for a single row, a lone sequence then runs in company (`docs/decisions/0005-rows-in-company.md`)."""


class Cloud(Value):
    """Who answers requests that the cluster itself cannot: a model at an endpoint outside, which the agents know by
    its name (`agent.clouds`): no plan says where that is, so nobody who can sign plans can send prompts elsewhere."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    model: Annotated[str, StringConstraints(pattern=r"^[!-~]{1,256}$")]
    """What the model is called there."""
    waits_s: float = Field(default=0.0, ge=0, le=3600)
    """A request to a cold model waits for it here if loading takes no longer than that."""


class ServiceOf(Value):
    """A service of a pipeline."""

    pipeline: DeploymentId
    service: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class Deployment(Value):
    """Desired state, as an operator writes it."""

    name: DeploymentId
    model: Sha256
    """Digest of the model's manifest."""
    settings: Settings = Settings()
    stages: int | None = Field(default=None, ge=1, le=256)
    """How many stages to cut the model into; None lets the planner choose."""
    placement: Chain | Placement | None = None
    """A placement the operator insists on, one chain of stages or a list of them; the planner then only checks that
    it fits."""
    slo: Slo | None = None
    """The class of its requests, as far as they do not say otherwise."""
    routes: int | None = Field(default=None, ge=1, le=ROUTES_MAX)
    """How many routes share the requests; None lets the planner decide, by what there is to do."""
    sensitive: Sensitive | None = None
    """Blocks that no untrusted node may hold, not even while a plan is prepared; None where it does not matter."""
    sealed: bool = False
    """Whether only sealed requests are taken. Trusted agents alone read them, so the first block, whose node is the
    ingress, is sensitive then."""
    on_demand: bool = False
    """Whether it may go cold (`Plan.cold`) where others need the memory, and be loaded again once it is asked for."""
    cloud: Cloud | None = None
    """Who answers what the cluster cannot, if anybody may. Where there is no room for it, it is cold."""
    service_of: ServiceOf | None = None
    """Of which pipeline it is a service. Such a deployment is made and ended with its pipeline, never by itself."""
    ruled: SkipJsonSchema[tuple[Sensitive, ...]] = Field(default=(), exclude=True)
    """What the root's policy adds to them. It is never written down: the policy of the day holds."""
    models: SkipJsonSchema[tuple[Sha256, ...] | None] = Field(default=None, exclude=True)
    """The only models that the root's policy lets it run; None: any. Never written down either."""

    @property
    def is_barred(self) -> bool:
        """Whether the root's policy does not let it run its model."""
        return self.models is not None and self.model not in self.models

    @property
    def outside(self) -> Cloud | None:
        """`cloud`, where requests may leave the cluster: not where any block is sensitive, whoever says so."""
        return None if self.has_sensitive else self.cloud

    @property
    def chains(self) -> Placement | None:
        """`placement` as one chain for each route."""
        return chains_of(self.placement)

    def sensitive_of(self, block_count: int) -> frozenset[int]:
        """The sensitive blocks of a model of `block_count` blocks. An operator may have named some that it has not."""
        first = {0} if self.sealed else ()
        return sensitive_blocks(self.sensitive, block_count).union(ruled_blocks(self.ruled, block_count), first)

    @property
    def has_sensitive(self) -> bool:
        """Whether any block may be sensitive, of whatever model."""
        return self.sensitive is not None or self.sealed or bool(self.ruled)


def ruled_blocks(rules: Iterable[Sensitive], block_count: int) -> frozenset[int]:
    """The blocks that rules name which were made without knowing the model, of one of `block_count` blocks."""
    return frozenset(block for rule in rules for block in sensitive_blocks(rule, block_count) if block < block_count)


def sensitive_blocks(sensitive: Sensitive | None, block_count: int) -> frozenset[int]:
    """The blocks that `sensitive` names in a model of `block_count` blocks."""
    match sensitive:
        case None:
            return frozenset()
        case "all":
            return frozenset(range(block_count))
        case "ends":
            return frozenset({0, block_count - 1})
        case str():
            deep = int(sensitive.removeprefix("ends:"))
            return frozenset(b for b in range(block_count) if min(b, block_count - 1 - b) <= deep)
        case blocks:
            return frozenset(blocks)


def chains_of(placement: Chain | Placement | None) -> Placement | None:
    """A plain list of stages is one route."""
    if placement is None:
        return None
    plain = tuple(part for part in placement if isinstance(part, Stage))
    listed = tuple(part for part in placement if not isinstance(part, Stage))
    return (*listed, plain) if plain or not listed else listed


def nodes_of(placement: Placement) -> tuple[NodeId, ...]:
    """Each once, in the order in which they appear."""
    return tuple(dict.fromkeys(NodeId(stage.node) for chain in placement for stage in chain))


def blocks_by_node(placement: Placement) -> dict[NodeId, set[int]]:
    """What it puts where, over all of its routes."""
    found: dict[NodeId, set[int]] = {}
    for chain in placement:
        for stage in chain:
            found.setdefault(NodeId(stage.node), set()).update(stage.blocks)
    return found


class NodeWish(Value):
    """Desired state of one node, as an operator said it last. A node nobody spoke about may be used, and is trusted
    unless it says that it is of the tier `cloud`."""

    node: NodeName
    drained: bool = False
    """No plan is to use it: it is about to be serviced. This holds until the operator takes it back."""
    trusted: bool | None = None
    """Whether it may hold sensitive blocks. None: nobody said so, and its tier decides."""

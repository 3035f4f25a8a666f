"""A scenario as a value: the machines, what goes wrong with them, who asks for what, and what it is held to.

Everything random is said as a distribution here and drawn in `simulator.draws`, so that one seed gives one world
whatever decides in it. Files are read in `simulator.files`.
"""

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.base import DeploymentId, NodeId, NodeName, Value
from schemas.capacity import Tier
from schemas.deployment import Sensitive, Settings
from schemas.slo import Slo

Seconds = Annotated[float, Field(ge=0, le=30 * 24 * 3600)]
Share = Annotated[float, Field(ge=0, le=1)]
SiteName = NodeName

NODES_MAX = 100_000
"""Of one scenario, twenty times as many as the largest one that is shipped needs to be."""
NAME_LENGTH_MAX = 63


class ModelSpec(Value):
    """A decoder as blocks: an embedding, equal layers, a head."""

    name: str = Field(min_length=1, max_length=64)
    layers: int = Field(ge=1, le=1000)
    hidden: int = Field(ge=1, le=1 << 20)
    """Width of what crosses a boundary, in elements."""
    element_bytes: float = Field(default=2.0, gt=0, le=8)
    """Of one element that crosses a boundary."""
    layer_bytes: int = Field(ge=1, le=1 << 44)
    """Weights of one layer."""
    ends_bytes: int = Field(ge=0, le=1 << 44)
    """Weights of the embedding, and as many of the head."""
    layer_flops: int = Field(ge=1, le=1 << 50)
    """Of one token through one layer."""
    head_flops: int = Field(ge=1, le=1 << 50)
    layer_kv_bytes: int = Field(ge=0, le=1 << 30)
    """What one token leaves in the cache of one layer."""
    context_tokens: int = Field(default=4096, ge=2, le=1 << 24)

    @property
    def blocks(self) -> int:
        return self.layers + 2


class NodeSpec(Value):
    """What a kind of machine can do."""

    flops_per_s: float = Field(gt=0, le=1e18)
    bytes_per_s: float = Field(gt=0, le=1e15)
    """Weights streamed per second."""
    memory_bytes: int = Field(ge=0, le=1 << 50)
    """What blocks and caches may take."""
    disk_bytes_per_s: float = Field(default=5e8, gt=0, le=1e12)
    """At which blocks are loaded."""
    idle_w: float = Field(default=10.0, ge=0, le=1e5)
    busy_w: float = Field(default=60.0, ge=0, le=1e5)
    tier: Tier = "edge"
    price_per_hour: float = Field(default=0.0, ge=0, le=1e6)
    trusted: bool = True


class SiteSpec(Value):
    """Machines in one place. They are named `SITE-0`, `SITE-1`, and so on."""

    name: SiteName
    nodes: int = Field(ge=1, le=10_000)
    node: str
    """The kind of each, a key of `Scenario.kinds`."""
    trusted: bool | None = None
    """Where it differs from what the kind says."""
    clients: bool = True
    """Whether requests arrive here."""

    @property
    def members(self) -> tuple[NodeId, ...]:
        """The names of its machines."""
        return tuple(NodeId(f"{self.name}-{number}") for number in range(self.nodes))


class LinkSpec(Value):
    """A kind of link. Quality varies as a Gilbert-Elliott chain between good and bad times an AR(1) of the logarithm
    (mathematics.md, part D)."""

    rtt_ms: float = Field(ge=0, le=60_000)
    mbit_per_s: float = Field(gt=0, le=1e7)
    jitter: float = Field(default=0.05, ge=0, le=2)
    """Standard deviation of the logarithm of a transfer's time."""
    bad_share: Share = 0.0
    """Of the time in the bad state."""
    bad_factor: float = Field(default=5.0, ge=1, le=1e4)
    """How many times slower a bad link is."""
    bad_s: float = Field(default=5.0, gt=0, le=1e6)
    """Mean length of a bad spell."""
    drift: float = Field(default=0.0, ge=0, le=2)
    """Standard deviation of the AR(1) of the logarithm of its rate."""
    drift_s: float = Field(default=60.0, gt=0, le=1e6)
    """Over which that forgets."""


class NetworkSpec(Value):
    """Links within a site, between two sites, and to machines of the tier `cloud`."""

    within: LinkSpec
    between: LinkSpec
    cloud: LinkSpec


class RequestClass(Value):
    """One class of requests (mathematics.md, part D: P, C and G). Lengths are log-normal around the mean given."""

    name: DeploymentId
    share: float = Field(gt=0, le=1e6)
    """Of the requests, relative to the other classes."""
    prompt_tokens: int = Field(ge=1, le=1 << 20)
    output_tokens: int = Field(ge=1, le=1 << 20)
    spread: float = Field(default=0.0, ge=0, le=2)
    """Standard deviation of the logarithm of both lengths."""
    slo: Slo = Slo()


class Ramp(Value):
    """The rate becomes `factor` times as high, over `rise_s`, stays so, and falls as it rose."""

    at_s: Seconds
    rise_s: Seconds = 0.0
    stay_s: Seconds
    factor: float = Field(ge=0, le=1e4)


class Workload(Value):
    """Who asks, and when. A trace gives arrivals and lengths; then `rate_per_s` scales time if it is given."""

    process: Literal["poisson", "mmpp", "periodic", "trace"] = "poisson"
    rate_per_s: float | None = Field(default=None, gt=0, le=1e6)
    """Requests per second, on average; of `periodic` the rate of the ticks."""
    classes: tuple[RequestClass, ...] = Field(min_length=1, max_length=32)
    burst_factor: float = Field(default=4.0, ge=1, le=1e4)
    """`mmpp`: how many times as many come in a burst as between bursts."""
    burst_share: float = Field(default=0.1, gt=0, lt=1)
    burst_s: float = Field(default=20.0, gt=0, le=1e6)
    jitter: Share = 0.1
    """`periodic`: of the period, either way."""
    ramps: tuple[Ramp, ...] = Field(default=(), max_length=1000)
    moves_s: tuple[float, float] | None = None
    """Requests come from one site at a time, which changes after a time between these two (a vehicle, a shift)."""
    trace: str | None = None
    """A file in the format of the Azure LLM inference traces or of BurstGPT, relative to the scenario's file."""

    @model_validator(mode="after")
    def _fits_the_process(self) -> Self:
        if (self.process == "trace") != (self.trace is not None):
            raise ValueError('trace: a file goes with process = "trace", and with no other')
        if self.process != "trace" and self.rate_per_s is None:
            raise ValueError(f"rate_per_s: process = {self.process!r} needs it")
        if self.moves_s is not None and not 0 < self.moves_s[0] <= self.moves_s[1]:
            raise ValueError(f"moves_s: {list(self.moves_s)} is not a shortest and a longest time, above 0")
        return self


class Where(Value):
    """Whom a fault is about: named nodes, or a share of a site's or of all nodes, drawn with the seed."""

    nodes: tuple[NodeName, ...] = ()
    sites: tuple[SiteName, ...] = ()
    share: Share | None = None
    by_site: bool = False
    """Whole sites are drawn rather than single nodes."""
    in_plan: int | None = Field(default=None, ge=0)
    """The node that runs so many stages behind the first when the fault comes. Only for scenarios of one's own: the
    victims then depend on who decides."""


class Fault(Value):
    """Something that happens at one time, or again and again, and ends after `lasts_s` (never, if None)."""

    kind: Literal[
        "kill", "hang", "slow", "throttle", "links", "cut", "cloud-links", "lie", "leader",
        "drain", "distrust", "lock", "redeploy",
    ]  # fmt: skip
    """`slow`: someone else computes there. `throttle`: it says so. `links`: of those nodes, slower. `cut`: of those
    nodes towards all others, gone. `cloud-links`: between edge and cloud, slower. `lie`: reports times `factor` times
    too short. `leader`: the orchestrator is killed. What operators do, unless it is refused them: `drain` and
    `distrust` of those nodes, taken back at the end; `lock`: the plan in force as it is, until the end; `redeploy`:
    with other settings, so that nothing of a sequence can cross."""
    at_s: Seconds
    every_s: float | None = Field(default=None, ge=1, le=1e6)
    """The same happens again as long after it began, until requests no longer arrive."""
    lasts_s: Seconds | None = None
    factor: float = Field(default=1.0, gt=0, le=1e6)
    where: Where = Where()

    def until(self, end_s: float) -> tuple["Fault", ...]:
        """Each time that it happens before `end_s`, for itself; the first time in any case."""
        if self.every_s is None:
            return (self,)
        times = 1 + max(0, ceil((end_s - self.at_s) / self.every_s) - 1)
        return tuple(
            self.model_copy(update={"at_s": self.at_s + number * self.every_s, "every_s": None})
            for number in range(times)
        )


class Churn(Value):
    """Faults that come by themselves, to every node independently."""

    mtbf_s: float | None = Field(default=None, gt=0)
    """Mean time between the deaths of one node; it is back after `mttr_s` on average."""
    mttr_s: float = Field(default=120.0, gt=0)
    site_mtbf_s: float | None = Field(default=None, gt=0)
    """Whole sites, likewise."""
    site_mttr_s: float = Field(default=60.0, gt=0)
    slow_every_s: float | None = Field(default=None, gt=0)
    """Mean time between two spells in which a node is slower (a Markov chain over {1, 2, 5})."""
    slow_s: float = Field(default=60.0, gt=0)
    slow_factors: tuple[Annotated[float, Field(ge=1, le=1e4)], ...] = Field(default=(2.0, 5.0), min_length=1)
    after_s: Seconds = 0.0
    until_s: Seconds | None = None


class Telemetry(Value):
    """What is reported of the truth."""

    noise: float = Field(default=0.05, ge=0, le=2)
    """Standard deviation of the logarithm of a measured time."""
    delay_s: float = Field(default=0.05, ge=0, le=600)
    """Of a heartbeat, on average."""


class BusSpec(Value):
    """The control plane's messages. What is stored in a stream is never lost, but may come late and twice."""

    delay_ms: float = Field(default=2.0, ge=0, le=60_000)
    drop: Share = 0.0
    duplicate: Share = 0.0
    reorder: Share = 0.0
    """Of messages, those that take ten times as long."""
    clock_skew_s: float = Field(default=0.0, ge=0, le=1e5)
    """Standard deviation of the difference between two nodes' clocks."""


class Served(Value):
    """How the model is deployed."""

    settings: Settings = Settings(max_sequences=32, max_queued=256)
    sensitive: Sensitive | None = None
    stages: int | None = Field(default=None, ge=1, le=256)
    routes: int | None = Field(default=None, ge=1, le=16)
    slo: Slo | None = None
    on_demand: bool = False


class Scenario(Value):
    """All of it."""

    name: DeploymentId
    title: str = Field(min_length=1, max_length=200)
    duration_s: float = Field(gt=0, le=30 * 24 * 3600)
    warmup_s: Seconds = 30.0
    """Requests begin to arrive then, and are counted from then on: the first plan is no adaptation."""
    drain_s: Seconds = 60.0
    """After the last arrival; what has not ended by then has not ended."""
    timeout_s: float = Field(default=60.0, gt=0, le=1e6)
    """The hard timeout: what is rejected, fails or does not end counts as having taken this long."""
    model: ModelSpec
    served: Served = Served()
    kinds: dict[str, NodeSpec] = Field(min_length=1)
    sites: tuple[SiteSpec, ...] = Field(min_length=1, max_length=10_000)
    network: NetworkSpec
    workload: Workload
    faults: tuple[Fault, ...] = Field(default=(), max_length=10_000)
    churn: Churn = Churn()
    telemetry: Telemetry = Telemetry()
    bus: BusSpec = BusSpec()
    sweep: dict[str, Annotated[tuple[float, ...], Field(min_length=1, max_length=100)]] = Field(
        default={}, max_length=4
    )
    """Values to try, one after the other, of a key of this file written with dots, or of `chi` (`simulator.files`)."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [site.name for site in self.sites]
        for number, site in enumerate(self.sites):
            if site.node not in self.kinds:
                known = ", ".join(sorted(self.kinds))
                raise ValueError(f"sites.{number}.node: there is no kind {site.node!r}; the kinds are {known}")
            if site.name in names[:number]:
                raise ValueError(f"sites.{number}.name: {site.name!r} is the name of another site too")
            if len(site.name) + len(f"-{site.nodes - 1}") > NAME_LENGTH_MAX:
                raise ValueError(f"sites.{number}.name: {site.name!r} is too long to name its nodes after")
        total = sum(site.nodes for site in self.sites)
        if total > NODES_MAX:
            raise ValueError(f"sites: these are {total} nodes; a scenario has {NODES_MAX} at most")
        nodes = {node for site in self.sites for node in site.members}
        for number, site in enumerate(self.sites):
            if site.name in nodes:
                raise ValueError(f"sites.{number}.name: {site.name!r} is the name of a node of another site too")
        for number, fault in enumerate(self.faults):
            if fault.kind == "cut" and fault.where == Where():
                raise ValueError(f"faults.{number}.where: a cut is between some nodes and the others; name some")
            if fault.where.by_site and (fault.where.share is None or fault.where.nodes):
                raise ValueError(f"faults.{number}.where.by_site: it draws sites, so it takes a share and no nodes")
            for name in fault.where.sites:
                if name not in names:
                    known = ", ".join(sorted(names)[:20])
                    raise ValueError(f"faults.{number}.where.sites: there is no site {name!r}; there are {known}")
            for node in fault.where.nodes:
                if node not in nodes:
                    raise ValueError(
                        f"faults.{number}.where.nodes: there is no node {node!r}; nodes are named SITE-0 and so on"
                    )
        return self

    @model_validator(mode="after")
    def _something_arrives_and_fits(self) -> Self:
        if not any(site.clients for site in self.sites):
            raise ValueError("sites: requests arrive nowhere; give some site clients = true")
        if self.warmup_s >= self.duration_s:
            raise ValueError(
                f"warmup_s: requests arrive from warmup_s = {self.warmup_s:g} to duration_s = {self.duration_s:g}, "
                "which is never"
            )
        context = self.served.settings.context_tokens
        if context > self.model.context_tokens:
            raise ValueError(
                f"served.settings.context_tokens: {context} are more than the {self.model.context_tokens} "
                "of model.context_tokens"
            )
        for number, kind in enumerate(self.workload.classes):
            if self.workload.trace is None and kind.prompt_tokens + kind.output_tokens > context:
                raise ValueError(
                    f"workload.classes.{number}.prompt_tokens: {kind.prompt_tokens} and {kind.output_tokens} of output "
                    f"are more than served.settings.context_tokens = {context}"
                )
        return self

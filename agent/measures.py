"""What an agent shows Prometheus: the figures of its heartbeat, and what requests met that ended here.

Units are those of Prometheus (seconds, bytes, ratios), names of OpenTelemetry's conventions where those have one.
"""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import Metric

from profiler.exposition import FIRST_S, PACE_S, Told, counter, gauge, troubles
from schemas.audit import AuditKind
from schemas.capacity import Capacity, Service

NODE, LINK, STAGE = ("node",), ("node", "peer"), ("node", "deployment", "epoch", "state")
OF, COUNTED = ("gen_ai_request_model",), ("node", "deployment")


class AgentMeasures:
    """The figures of one agent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._told = Told()
        self.registry.register(self._told)
        self._first = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a request's admission to its first token, of those that ran over one route.",
            OF,
            buckets=FIRST_S,
            registry=self.registry,
        )
        self._pace = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Between tokens after the first, of the same requests.",
            OF,
            buckets=PACE_S,
            registry=self.registry,
        )
        self._seen = -1
        """The newest finished request that was counted."""

    def said(
        self, capacity: Capacity, events: Mapping[AuditKind, int], bus: Mapping[str, int], journal_waits_s: float
    ) -> None:
        """A heartbeat; `events` were recorded, and `bus` met, since the process began, and the journal waits for so
        long. Of requests that end within one second only as many are counted as a heartbeat names."""
        node = {"node": str(capacity.node)}
        waits = gauge(
            "resplit_journal_waits_seconds", "Since when JetStream has stored nothing.", NODE, [(node, journal_waits_s)]
        )
        self._told.tell([*families(capacity, events), troubles(str(capacity.node), bus), waits])
        for one in capacity.finished:
            if one.number <= self._seen:
                continue
            self._seen = one.number
            self._first.labels(one.deployment).observe(one.ttft_ms / 1e3)
            if one.tpot_ms is not None:
                self._pace.labels(one.deployment).observe(one.tpot_ms / 1e3)


def families(capacity: Capacity, events: Mapping[AuditKind, int]) -> Iterator[Metric]:
    """The figures of one heartbeat."""
    node = {"node": str(capacity.node)}

    def of_node(name: str, what: str, value: float | None) -> Metric:
        return gauge(f"resplit_node_{name}", what, NODE, [(node, value)])

    yield of_node("load_ratio", "Share of its cores that is busy.", capacity.load)
    yield of_node("gpu_load_ratio", "Share of the last period in which its GPU ran a kernel.", capacity.gpu_load)
    yield of_node("memory_total_bytes", "Memory of the device that computes.", capacity.memory_total_bytes)
    yield of_node("memory_free_bytes", "Of that, what new blocks and caches may take.", capacity.memory_free_bytes)
    yield of_node("disk_free_bytes", "Free on the disk of its store.", capacity.disk_free_bytes)
    yield of_node("temperature_celsius", "Of the device that computes.", capacity.temperature_c)
    yield of_node("power_watts", "Drawn by the device that computes.", capacity.power_w)
    yield of_node("slowdown_ratio", "How many times longer than at load time a step takes.", capacity.slowdown)
    unguided = 0.0 if capacity.guidance is None else capacity.guidance.silent_s or 0.0
    yield of_node("unguided_seconds", "Since when no word of the orchestrator has come.", unguided)
    withheld = 0 if capacity.guidance is None else len(capacity.guidance.withheld)
    yield of_node("withheld_plans", "Deployments of which the newest plan did not reach it.", withheld)
    yield of_node("stalled_routes", "Routes on which a step is overdue.", len(capacity.stalled))
    yield counter("resplit_node_energy_joules", "Of the device that computes.", NODE, [(node, capacity.energy_j)])
    yield from _links(capacity, node)
    yield gauge(
        "resplit_stage_sequences",
        "Sequences that run on the blocks of one plan.",
        STAGE,
        [
            ({**node, "deployment": s.deployment, "epoch": str(s.epoch), "state": s.state}, s.sequences)
            for s in capacity.stages
        ],
    )
    yield from _services(capacity.service, node)
    yield counter(
        "resplit_audit_events",
        "Events recorded, by kind.",
        ("source", "kind"),
        [({"source": str(capacity.node), "kind": kind.value}, count) for kind, count in sorted(events.items())],
    )


def _links(capacity: Capacity, node: Mapping[str, str]) -> Iterator[Metric]:
    found = [({**node, "peer": str(link.peer)}, link) for link in capacity.links]
    yield gauge("resplit_link_rtt_seconds", "Median round trip.", LINK, [(to, one.rtt_ms / 1e3) for to, one in found])
    yield gauge(
        "resplit_link_goodput_bytes_per_second",
        "Payload delivered in long transfers.",
        LINK,
        [(to, one.goodput_bytes_per_s) for to, one in found],
    )
    yield gauge(
        "resplit_link_up", "0: only the bus reaches this peer.", LINK, [(to, float(one.up)) for to, one in found]
    )


def _services(services: tuple[Service, ...], node: Mapping[str, str]) -> Iterator[Metric]:
    found = [({**node, "deployment": str(one.deployment)}, one) for one in services]
    yield gauge(
        "resplit_requests_waiting", "Accepted and not begun.", COUNTED, [(of, one.waiting) for of, one in found]
    )
    for name, what in (
        ("arrived", "Accepted, or refused for want of capacity."),
        ("met", "Ended in output, and met every target of their class."),
        ("missed", "Missed a target, or ended in an error that is not the client's."),
    ):
        samples = [(of, getattr(one, name)) for of, one in found]
        yield counter(f"resplit_requests_{name}", what, COUNTED, samples)
    yield counter(
        "resplit_prompt_tokens",
        "Computed, of requests that ended.",
        COUNTED,
        [(of, o.prompt_tokens) for of, o in found],
    )
    yield counter("resplit_output_tokens", "Said.", COUNTED, [(of, one.output_tokens) for of, one in found])
    clouds = [(of, one.cloud) for of, one in found if one.cloud is not None]
    yield counter("resplit_cloud_asked", "Requests put to a cloud.", COUNTED, [(of, one.asked) for of, one in clouds])
    yield counter("resplit_cloud_answered", "Of those answered.", COUNTED, [(of, one.answered) for of, one in clouds])
    yield counter("resplit_cloud_cost", "By the endpoints' prices.", COUNTED, [(of, one.cost) for of, one in clouds])

"""What an orchestrator shows Prometheus: what operators are told, as figures, while it leads."""

from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from profiler.exposition import Told, counter, gauge, troubles
from schemas.audit import AuditKind
from schemas.control import DeploymentStatus, StatusReply

STATES: tuple[str, ...] = get_args(DeploymentStatus.model_fields["state"].annotation)
OF = ("deployment",)


class OrchestratorMeasures:
    """The figures of one orchestrator."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._told = Told()
        self.registry.register(self._told)

    def told(self, seen: StatusReply | None, events: Mapping[AuditKind, int], bus: Mapping[str, int]) -> None:
        """What it sees; None while it stands by. `events` were recorded, and `bus` met, since the process began."""
        self._told.tell([*families(seen, events), troubles("orchestrator", bus)])


def families(seen: StatusReply | None, events: Mapping[AuditKind, int]) -> Iterator[Metric]:
    """The figures of one look."""
    yield gauge("resplit_orchestrator_leads", "1 of the one that leads.", (), [({}, float(seen is not None))])
    yield counter(
        "resplit_audit_events",
        "Events recorded, by kind.",
        ("source", "kind"),
        [({"source": "orchestrator", "kind": kind.value}, count) for kind, count in sorted(events.items())],
    )
    if seen is None:
        return
    yield gauge("resplit_orchestrator_term", "The term in which it leads.", (), [({}, seen.term)])
    yield gauge("resplit_orchestrator_standbys", "Orchestrators that would take over.", (), [({}, len(seen.standbys))])
    nodes = [({"node": str(one.capacity.node)}, one) for one in seen.nodes]
    yield gauge("resplit_node_up", "0: it is lost.", ("node",), [(of, float(not one.lost)) for of, one in nodes])
    yield gauge(
        "resplit_node_heard_seconds", "Since its last heartbeat.", ("node",), [(of, one.age_s) for of, one in nodes]
    )
    drained = [({"node": str(node)}, 1.0) for node in seen.drained]
    yield gauge("resplit_node_drained", "Nodes that no new plan uses.", ("node",), drained)
    found = [({"deployment": str(one.name)}, one) for one in seen.deployments]
    yield gauge(
        "resplit_deployment_state",
        "1 of the state that it is in.",
        (*OF, "state"),
        [({**of, "state": state}, float(one.state == state)) for of, one in found for state in STATES],
    )
    epochs = [(of, None if one.current is None else float(one.current.epoch)) for of, one in found]
    yield gauge("resplit_deployment_epoch", "Of the plan in force.", OF, epochs)
    stages = [
        (of, None if one.current is None else sum(len(r.stages) for r in one.current.routes)) for of, one in found
    ]
    yield gauge("resplit_deployment_stages", "Of the plan in force, over all routes.", OF, stages)
    predicted = [(of, (one.estimate or {}).get("tpot_ms")) for of, one in found]
    yield gauge(
        "resplit_deployment_predicted_token_seconds",
        "What a token is predicted to take under the plan in force.",
        OF,
        [(of, None if value is None else value / 1e3) for of, value in predicted],
    )
    yield gauge("resplit_deployment_slo_met_ratio", "Of the requests of the last minutes.", OF, [
        (of, None if one.attainment is None else one.attainment.share) for of, one in found
    ])  # fmt: skip
    for window, name in enumerate(("short", "long")):
        yield gauge(
            f"resplit_deployment_slo_burn_{name}_ratio",
            f"How many times too fast the error budget is used up, over the {name} window.",
            OF,
            [
                (of, None if one.attainment is None or one.attainment.burn is None else one.attainment.burn[window])
                for of, one in found
            ],
        )
    errors = [(of, (one.prediction_error or {}).get("tpot")) for of, one in found]
    yield gauge("resplit_deployment_prediction_error_ratio", "Median of |error| of tokens' times.", OF, errors)

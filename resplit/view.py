"""Plans, nodes and deployments in words, as every command that shows them puts it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from resplit.output import progress_bar, size
from schemas.deployment import Placement, Stage
from schemas.plan import spans

if TYPE_CHECKING:
    from collections.abc import Callable

    from schemas.control import CloudStatus, DeploymentStatus, NodeStatus, StatusReply
    from schemas.plan import Plan

REASONS = ("why", "reason")
"""Fields of an event that say why; of one that has both the first is the more particular one."""
NODE_COLUMNS = ["node", "state", "on", "threads", "memory free", "of", "load", "heard", "blocks"]
DEPLOYMENT_COLUMNS = ["deployment", "model", "state", "epoch", "stages", "TPOT ms", "SLO met", "remarks"]


def led(reply: "StatusReply") -> str:
    """Who leads the cluster, and who would take over."""
    if reply.leader is None:
        return f"term {reply.term}"
    since = reply.leader.since.astimezone().isoformat(sep=" ", timespec="seconds")
    others = f"standing by: {', '.join(reply.standbys)}" if reply.standbys else "nobody stands by"
    return f"{reply.leader.leader} leads in term {reply.leader.term} since {since}; {others}"


def node_row(node: "NodeStatus", drained: tuple[str, ...]) -> list[str]:
    """One node under `NODE_COLUMNS`."""
    capacity = node.capacity
    return [
        capacity.node,
        node_state(node, drained),
        f"{capacity.provider.name} ({capacity.provider.device})",
        str(capacity.threads),
        size(capacity.memory_free_bytes),
        size(capacity.memory_total_bytes),
        f"{100 * capacity.load:.0f} %",
        f"{node.age_s:.1f} s ago",
        hosted(node) or "-",
    ]


def node_state(node: "NodeStatus", drained: tuple[str, ...]) -> str:
    """Whether the node is there, whether plans may use it, its tier, whether it may hold what is sensitive, and whether
    what is newest reaches it."""
    capacity = node.capacity
    said = ["lost" if node.lost else "up"]
    if capacity.tier == "cloud":
        said.append(f"cloud at {capacity.price_per_hour:g}/h" if capacity.price_per_hour else "cloud")
    if node.trusted != (capacity.tier == "edge"):
        said.append("trusted" if node.trusted else "not trusted")
    if capacity.node in drained:
        said.append("draining" if capacity.stages else "drained")
    return ", ".join([*said, *astray(node)])


def astray(node: "NodeStatus") -> list[str]:
    """What keeps the node from following what is newest, as it says itself."""
    guidance = node.capacity.guidance
    if guidance is None:
        return []
    said = [] if guidance.silent_s is None else [f"unguided for {guidance.silent_s:.0f} s"]
    missing: list[str] = [*guidance.withheld]
    if guidance.withheld_roster is not None:
        missing.append(f"roster {guidance.withheld_roster}")
    return [*said, *([f"withheld: {', '.join(missing)}"] if missing else [])]


def hosted(node: "NodeStatus") -> str:
    """What the node has loaded, as `deployment/epoch:blocks state`."""
    return ", ".join(f"{s.deployment}/{s.epoch}:{spans(s.blocks)} {s.state}" for s in node.capacity.stages)


def unheard(reply: "StatusReply") -> list[str]:
    """Drained nodes that the orchestrator has not heard since it started."""
    heard = {node.capacity.node for node in reply.nodes}
    return [node for node in reply.drained if node not in heard]


def deployment_row(found: "DeploymentStatus") -> list[str]:
    """One deployment under `DEPLOYMENT_COLUMNS`."""
    predicted = (found.estimate or {}).get("tpot_ms")
    return [
        found.name,
        found.model_name or "-",
        found.state,
        "-" if found.current is None else str(found.current.epoch),
        "-" if found.current is None else routes(found.current),
        "-" if predicted is None else f"{predicted:.1f}",
        attained(found),
        remarks(found),
    ]


def attained(found: "DeploymentStatus") -> str:
    """The share of the requests of the last minutes that met their class, and how many there were."""
    counted = found.attainment
    if counted is None:
        return "-"
    return f"{counted.met / (counted.met + counted.missed):.1%} of {counted.met + counted.missed}"


def remarks(found: "DeploymentStatus") -> str:
    """Why a deployment is not simply serving, and whether an operator decides its split."""
    said = [] if found.reason is None else [found.reason]
    if found.error is not None:
        said.append(f"{found.error.message} ({found.error.code})")
    if found.deployment is not None and found.deployment.cloud is not None and found.cloud is not None:
        said.append(outside(found.deployment.cloud.name, found.cloud))
    if found.deployment is not None and found.deployment.service_of is not None:
        said.append(f"service of {found.deployment.service_of.pipeline}")
    elif found.deployment is not None and found.deployment.placement is not None:
        said.append("locked")
    return "; ".join(said)


def outside(name: str, cloud: "CloudStatus") -> str:
    """What a cloud was asked, and what came of it."""
    if not cloud.nodes:
        return f"cloud {name}, which no node here knows"
    mean = "" if cloud.mean_ms is None else f" in {cloud.mean_ms:.0f} ms on average, {cloud.cost:.4g} in all"
    return f"cloud {name} answered {cloud.answered} of {cloud.asked}{mean}"


def routes(plan: "Plan") -> str:
    """Every route of a plan."""
    return f"at {', '.join(plan.nodes)}" if plan.cold else chains(plan.chains)


def chains(placement: Placement) -> str:
    """Routes as `n0:0-3 > n1:4-9 | n2:0-9`."""
    return " | ".join(chain(stages) for stages in placement)


def chain(stages: tuple[Stage, ...]) -> str:
    """Stages as `n0:0-3 > n1:4-9`."""
    return " > ".join(f"{stage.node}:{stage.first}-{stage.last}" for stage in stages)


@contextmanager
def readiness() -> "Iterator[Callable[[DeploymentStatus], None]]":
    """Show, on a terminal, how many nodes are ready for the plan that a deployment prepares."""
    with progress_bar() as progress:

        def show(found: "DeploymentStatus") -> None:
            if found.candidate is not None:
                progress(f"nodes ready for epoch {found.candidate.epoch}", len(found.ready), len(found.candidate.nodes))

        yield show

"""PURE: how soon a request can be at a service on a node, by mean times (`mathematics.md`, B1)."""

from collections.abc import Mapping

from orchestrator.services.problem import SOURCE, Setting, Stream
from schemas.base import NodeId


def arrivals_ms(setting: Setting, stream: Stream) -> Mapping[tuple[str, NodeId], float]:
    """By service and node: when the last of its inputs can be there, each service before it on whichever node is best.

    Infinite where no way leads.
    """
    task, found = setting.tasks[stream.task], dict[tuple[str, NodeId], float]()
    for name in task.order:
        for node in setting.hosts:
            found[name, node] = max(
                (_from(setting, stream, found, before, node) for before in task.after[name]), default=0.0
            )
    return found


def _from(
    setting: Setting, stream: Stream, found: Mapping[tuple[str, NodeId], float], before: str, node: NodeId
) -> float:
    if before == SOURCE:
        return setting.ways.ms(setting.tasks[stream.task].input, stream.at, node)
    service = setting.services[before]
    return min(
        found[before, other] + service.mean_ms + setting.ways.ms(service.output, other, node) for other in setting.hosts
    )

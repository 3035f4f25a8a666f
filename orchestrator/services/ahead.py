"""PURE: how soon a request can be at a service on a node, and how soon it can be done from there, by mean times
(`mathematics.md`, B1 and B4)."""

from collections.abc import Mapping

import numpy as np

from orchestrator.services.problem import SOURCE, Floats, Setting, Stream, TaskKind
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
        found[before, other] + service.mean_ms / host.speed + setting.ways.ms(service.output, other, node)
        for other, host in setting.hosts.items()
    )


def left_ms(setting: Setting, task: TaskKind, counts: Mapping[str, Floats]) -> Mapping[str, Floats]:
    """By service: what there is to come at least once it is done on each node, if the services behind it are where
    there are instances (`counts`, by service and node) and nothing waits. 0 of what nothing is known to follow."""
    found: dict[str, Floats] = {}
    nodes = np.arange(len(setting.hosts))
    for name in reversed(task.order):
        left = np.zeros(len(nodes))
        for behind, befores in task.after.items():
            hosts = np.flatnonzero(counts[behind]) if name in befores else ()
            if len(hosts):
                way = setting.table.ms(setting.services[name].output, nodes[:, None], np.asarray(hosts)[None, :])
                works = setting.services[behind].mean_ms / setting.speeds[hosts]
                left = np.maximum(left, (way + found[behind][hosts] + works).min(axis=1))
        found[name] = left
    return found

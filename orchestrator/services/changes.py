"""PURE: what may make a plan of light services better, the likeliest first."""

from collections.abc import Iterator, Mapping
from itertools import chain, islice

import numpy as np

from orchestrator.services.core import FAR_MS
from orchestrator.services.lateness import Outlook
from orchestrator.services.problem import Floats, Setting, Stream
from orchestrator.services.routing import Plan, using

WIDTH = 4
"""Instances that are tried of each service that is in question: on the nodes nearest to who uses it."""
WANTED = 2
"""Services of which more is tried."""

Change = tuple[str, tuple[tuple[int, int], ...]]
"""Of one service, by how much the instances on some nodes change, these by number."""


def changes(
    plan: Plan, expected: Mapping[Stream, Outlook], weights: Mapping[str, float], turn: int, most: int
) -> list[Change]:
    """What late requests use chosen anew and more of it, less of what little needs, one of that elsewhere: `most` of
    these, each `turn` from another one on."""
    setting = plan.setting
    idle = sorted(
        (plan.flows[name][at] / counts[at], name, int(at))
        for name, counts in plan.counts.items()
        if not setting.services[name].is_core
        for at in np.flatnonzero(counts)
    )
    spare = [one for one in idle if plan.counts[one[1]].sum() > setting.services[one[1]].least]
    kinds = [_more(plan, name) for name in _wanted(setting, expected, weights)[:WANTED]]
    kinds.append((name, ((at, -1),)) for _, name, at in spare[:WIDTH])
    kinds += [_elsewhere(plan, name, at) for _, name, at in idle[:WIDTH]]
    start = turn % len(kinds)
    return list(islice(chain(*kinds[start:], *kinds[:start]), most))


def _more(plan: Plan, name: str) -> Iterator[Change]:
    yield name, ()
    for node in _nearest(plan, name):
        yield name, ((node, 1),)


def _elsewhere(plan: Plan, name: str, at: int) -> Iterator[Change]:
    for other in _nearest(plan, name)[:1]:
        if other != at:
            yield name, ((at, -1), (other, 1))


def _wanted(setting: Setting, expected: Mapping[Stream, Outlook], weights: Mapping[str, float]) -> list[str]:
    """Light services by how much is late of what uses them: of what is never done, those alone that keep it."""
    found: dict[str, float] = {}
    for stream, one in expected.items():
        parts = one.lacks or dict.fromkeys(setting.tasks[stream.task].after, one.late)
        for name, part in parts.items():
            if part > 0.0 and not setting.services[name].is_core:
                found[name] = found.get(name, 0.0) + weights[stream.task] * stream.per_slot * part
    return sorted(found, key=lambda name: (-found[name], name))


def _nearest(plan: Plan, name: str) -> list[int]:
    """Nodes with room for one more, those first to which what it reads has the shortest way."""
    setting = plan.setting
    far = np.zeros(len(setting.hosts))
    for stream in using(setting, name):
        task = setting.tasks[stream.task]
        for before in task.after[name]:
            data = setting.passed_on(task, before)
            source = setting.numbers[plan.routes[stream].get(before, stream.at)]
            far += stream.per_slot * np.minimum(setting.table.all_ms(data, source), FAR_MS)
    kind = setting.services[name]
    able = plan.counts[name] < kind.most
    if kind.nodes is not None:
        able &= np.array([kind.may_be_at(node) for node in setting.nodes])
    for key, need in kind.needs.items():
        if need > 0.0:
            able &= _free(plan, key) + 1e-9 >= need
    return [int(node) for node in np.argsort(far, kind="stable") if able[node]][:WIDTH]


def _free(plan: Plan, resource: str) -> Floats:
    """What is left of a resource of each node."""
    setting = plan.setting
    used = sum(
        counts * need
        for name, counts in plan.counts.items()
        if (need := setting.services[name].needs.get(resource, 0.0)) > 0.0
    )
    return np.array([host.has.get(resource, 0.0) for host in setting.hosts.values()]) - used

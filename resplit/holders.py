"""PURE: who held which blocks of which model when, as far as the audit trail says it.

From what is recorded today: `plan_prepared` has the placement as text (its first 500 characters), `plan_ready` is a
node's own word that the blocks of an epoch are loaded, and `plan_aborted` and `plan_retired` are the leader's that
the epoch is over. `deployment_changed` has the digest of the model; where a deployment was made before the trail
begins, its model is not known. A node's word that it has unloaded a plan, and the blocks that lie on its disk ahead
of need, are not in the trail by their numbers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from schemas.audit import AuditEvent, AuditKind
from schemas.base import DeploymentName, NodeId

STAGE = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})\[(\d{1,9})-(\d{1,9})\]")
OVER = (AuditKind.PLAN_ABORTED, AuditKind.PLAN_RETIRED)

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Holding:
    """The blocks of one plan that one node had loaded, from its own word to the end of the plan."""

    node: NodeId
    deployment: DeploymentName
    epoch: int
    model: str | None
    """The manifest's digest, or None where the trail does not say it."""
    blocks: Ranges
    """First and last of each range; empty where the trail does not say which."""
    since: datetime
    until: datetime | None
    """None: the trail knows of no end."""


def holders(events: Iterable[AuditEvent], orchestrator: NodeId) -> tuple[Holding, ...]:
    """Every holding, in the order in which they began. Give it events whose signatures were verified.

    Of what is over only the words of `orchestrator` count, and of what is loaded those of the node itself.
    """
    models: dict[DeploymentName, str] = {}
    placed: dict[tuple[DeploymentName, int], dict[str, Ranges]] = {}
    found: dict[tuple[DeploymentName, int, NodeId], Holding] = {}
    for event in events:
        by_leader, name, epoch = event.source == orchestrator, event.deployment, event.epoch
        if name is None:
            continue
        if by_leader and event.kind is AuditKind.DEPLOYMENT_CHANGED and "model" in event.fields:
            models[name] = str(event.fields["model"])
        if epoch is None:
            continue
        if by_leader and event.kind is AuditKind.PLAN_PREPARED:
            placed[name, epoch] = _ranges(str(event.fields.get("placement", "")))
        elif event.kind is AuditKind.PLAN_READY:
            blocks = placed.get((name, epoch), {}).get(event.source, ())
            holding = Holding(event.source, name, epoch, models.get(name), blocks, event.at, None)
            found.setdefault((name, epoch, event.source), holding)
        elif by_leader and event.kind in OVER:
            placed.pop((name, epoch), None)
            for key, holding in found.items():
                if key[:2] == (name, epoch) and holding.until is None:
                    found[key] = replace(holding, until=event.at)
    return tuple(sorted(found.values(), key=lambda holding: holding.since))


def _ranges(placement: str) -> dict[str, Ranges]:
    """`n0[0-3] n1[4-7] | n2[0-7]` -> the ranges of each node; what was cut off in the middle is not there."""
    found: dict[str, list[tuple[int, int]]] = {}
    for node, first, last in STAGE.findall(placement):
        ranges = found.setdefault(node, [])
        if (int(first), int(last)) not in ranges:
            ranges.append((int(first), int(last)))
    return {node: tuple(ranges) for node, ranges in found.items()}

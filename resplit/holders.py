"""PURE: who held which blocks of which model when, by the nodes' own signed words in the audit trail.

`plan_ready` says that the blocks of a plan are loaded and which they are, `blocks_freed` that they are not any more. A
node that ended says nothing of its end: what it held then ends with the plan, by the leader's word, or with the node's
next life. The blocks that lie on its disk ahead of need are not in the trail by their numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from bus.identity import orchestrator_of
from schemas.audit import AuditEvent, AuditKind
from schemas.base import DeploymentName, NodeId, home_of

OVER = (AuditKind.PLAN_ABORTED, AuditKind.PLAN_RETIRED)

Key = tuple[DeploymentName, int, NodeId]


@dataclass(frozen=True)
class Holding:
    """The blocks of one plan that one node had loaded."""

    node: NodeId
    deployment: DeploymentName
    epoch: int
    model: str | None
    """The manifest's digest; None in a trail of an earlier release."""
    blocks: str | None
    """As `0-3,7`; None in a trail of an earlier release."""
    since: datetime
    until: datetime | None
    """None: the trail knows of no end."""


def holders(events: Iterable[AuditEvent]) -> tuple[Holding, ...]:
    """Every holding, in the order in which they began. Give it events whose signatures were verified."""
    found: dict[Key, Holding] = {}
    lives: dict[NodeId, str] = {}
    for event in events:
        node, name, epoch = NodeId(event.source), event.deployment, event.epoch
        life = None if event.chain is None else event.chain.life
        if life is not None and lives.get(node, life) != life:
            _end(found, [key for key in found if key[2] == node], event.at)
        if life is not None:
            lives[node] = life
        if name is None or epoch is None:
            continue
        key = name, epoch, node
        if event.kind is AuditKind.PLAN_READY:
            model, blocks = (_text(event, field) for field in ("model", "blocks"))
            found.setdefault(key, Holding(node, name, epoch, model, blocks, event.at, None))
        elif event.kind is AuditKind.BLOCKS_FREED and key in found:
            # The leader may have called the plan over before the node was done with it.
            found[key] = replace(found[key], until=event.at)
        elif event.source == orchestrator_of(home_of(name)) and event.kind in OVER:
            _end(found, [key for key in found if key[:2] == (name, epoch)], event.at)
    return tuple(sorted(found.values(), key=lambda holding: holding.since))


def _end(found: dict[Key, Holding], keys: Iterable[Key], at: datetime) -> None:
    for key in keys:
        if found[key].until is None:
            found[key] = replace(found[key], until=at)


def _text(event: AuditEvent, field: str) -> str | None:
    value = event.fields.get(field)
    return None if value is None else str(value)

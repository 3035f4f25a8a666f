"""PURE: where the blocks of a model are, and why there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.fold import Snapshot
from orchestrator.staging import may_come
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import StoredBlocks
from schemas.control import BlocksAt, MemoryTier
from schemas.deployment import blocks_by_node
from schemas.plan import Plan

UNWANTED = "nobody: it goes first where room is short"


@dataclass(frozen=True)
class _Wish:
    """For whom a node has some blocks, in words."""

    blocks: frozenset[int]
    why: str


def whereabouts(snapshot: Snapshot, model: Digest) -> tuple[BlocksAt, ...]:
    """What each node that is present has of a model, in memory and on its disk, by node, ascending. Blocks that are
    there for the same reasons stand together."""
    return tuple(found for node in snapshot.present for found in _at(snapshot, node, model))


def _at(snapshot: Snapshot, node: NodeId, model: Digest) -> Iterator[BlocksAt]:
    capacity = snapshot.present[node]
    loaded = {
        (stage.deployment, stage.epoch): frozenset(stage.blocks)
        for stage in capacity.stages
        if stage.model == model and stage.blocks
    }
    plans = _plans(snapshot, model)
    running = [_Wish(blocks, plans.get(key, f"{key[0]}, whose epoch {key[1]} ends")) for key, blocks in loaded.items()]
    tier: MemoryTier = "gpu" if capacity.provider.name == "cuda" else "memory"
    yield from _grouped(node, tier, model, frozenset().union(*loaded.values()), running)
    stored = frozenset[int]().union(*(one.blocks for one in capacity.on_disk if one.model == model))
    yield from _grouped(node, "disk", model, stored, [*running, *_wishes(snapshot, node, model)])


def _plans(snapshot: Snapshot, model: Digest) -> Mapping[tuple[str, int], str]:
    """What each live plan of a model is, by deployment and epoch."""
    found = {}
    for name, rollout in snapshot.rollouts.items():
        if rollout.current is not None:
            found[_key(rollout.current)] = f"{name} serves"
        if rollout.candidate is not None:
            found[_key(rollout.candidate.plan)] = f"{name} is being prepared"
        found |= {_key(old.plan): f"{name} drains" for old in rollout.draining}
    return found


def _key(plan: Plan) -> tuple[str, int]:
    return plan.deployment, plan.epoch


def _wishes(snapshot: Snapshot, node: NodeId, model: Digest) -> Iterator[_Wish]:
    """What deployments may want of this node next."""
    for name, deployment in sorted(snapshot.deployments.items()):
        if deployment.model == model:
            for why, chains in may_come(snapshot, DeploymentName(name)) or ():
                if blocks := blocks_by_node(chains).get(node):
                    yield _Wish(frozenset(blocks), f"{name} {why}")


def _grouped(
    node: NodeId, tier: MemoryTier, model: Digest, blocks: frozenset[int], wishes: Sequence[_Wish]
) -> Iterator[BlocksAt]:
    by_why: dict[tuple[str, ...], set[int]] = {}
    for block in sorted(blocks):
        whys = tuple(dict.fromkeys(wish.why for wish in wishes if block in wish.blocks))
        by_why.setdefault(whys or (UNWANTED,), set()).add(block)
    for whys, some in by_why.items():
        ranges = StoredBlocks.of(model, some).ranges
        yield BlocksAt(node=node, tier=tier, ranges=ranges, why=whys)

"""Who is given the keys of sealed blocks: the nodes that a plan puts them on, and that the root lets hold them."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import cache, partial

from bus.hpke import block_info, wrap
from bus.identity import Identity
from models.keyring import has_keys, read_keys
from models.store import Store
from schemas.base import Digest, NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import PlanEvent
from schemas.roster import Member, Roster, forbidden, members_at, sealing_key
from schemas.sealed import ModelKeys, NodeKeys, Wrap

log = logging.getLogger(__name__)

Hosts = Mapping[tuple[Digest, NodeId], frozenset[int]]
"""By model and node: blocks."""


def hosts(event: PlanEvent, roster: Roster, now: datetime) -> Hosts:
    """PURE: the blocks that the plans of `event` put on each node, without those that the node must not hold."""
    agents = {member.name for member in members_at(roster, "agent", now)}
    found: dict[tuple[Digest, NodeId], frozenset[int]] = defaultdict(frozenset)
    for plan in event.plans:
        for node in agents.intersection(plan.nodes):
            blocks = plan.blocks_on(node)
            barred = forbidden(roster.policy, roster, plan.deployment, plan.block_count, node, blocks)
            found[plan.model, node] |= frozenset(blocks) - barred
    return {place: blocks for place, blocks in found.items() if blocks}


def node_keys(keys: ModelKeys, blocks: Iterable[int], cluster: str, member: Member) -> NodeKeys:
    """The keys of these blocks, wrapped for one member; different bytes every time. Raises `ResplitError` for a block
    that the model has not, and for a member whose key nobody can have."""
    public = sealing_key(member)
    infos = {block: block_info(cluster, keys.model, block, member.name) for block in sorted(blocks)}
    wraps = tuple(Wrap.of(block, wrap(keys.key(block), public, info)) for block, info in infos.items())
    return NodeKeys(model=keys.model, node=member.name, wraps=wraps)


class KeyHolder:
    """Hands out the keys beside an orchestrator's store."""

    def __init__(self, store: Store, identity: Identity, now: Callable[[], datetime]) -> None:
        self._store = store
        self._identity = identity
        self._now = now

    def with_keys(self, event: PlanEvent) -> PlanEvent:
        """`event` with the keys that its nodes need. Those that cannot be had are left out, and said: the node that
        lacks them refuses the plan, and the others' plans go on."""
        roster = self._identity.roster
        keys_of = cache(partial(read_keys, self._store))
        found = []
        for (model, node), blocks in sorted(hosts(event, roster, self._now()).items()):
            member = roster.member(node)
            if member is None or not has_keys(self._store, model):
                continue  # a model in the open
            try:
                found.append(node_keys(keys_of(model), blocks, roster.cluster, member))
            except ResplitError as error:
                log.warning("no keys come with a plan of %s for %s: %s", event.deployment, node, error.message)
        return event.model_copy(update={"keys": tuple(found)}) if found else event

    def check(self, model: Digest, manifest: Manifest) -> None:
        """Raise `ResplitError(MISSING_KEYS)`, or CORRUPT_FILE, where `model` is sealed and its keys are not here."""
        if manifest.is_sealed and len(read_keys(self._store, model).keys) != len(manifest.blocks):
            message = f"the keys of model {model} are not those of its {len(manifest.blocks)} blocks"
            raise ResplitError(ErrorCode.CORRUPT_FILE, f"{message}; bring them again from where it was sealed", "model")

"""Who is given the keys of sealed blocks: the nodes that a plan puts them on, and that the root lets hold them."""

import base64
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from bus.hpke import block_info, wrap
from bus.identity import Identity
from models.keyring import has_keys, read_keys
from models.store import Store
from schemas.base import Digest, NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import PlanEvent
from schemas.roster import Roster, forbidden, members_at
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


def keys_for(hosts: Hosts, roster: Roster, models: Mapping[Digest, ModelKeys]) -> tuple[NodeKeys, ...]:
    """The keys of the blocks that each node hosts, wrapped for it; different bytes every time."""
    found = []
    for (model, node), blocks in sorted(hosts.items()):
        member, keys = roster.member(node), models.get(model)
        if member is None or keys is None:
            continue
        public = X25519PublicKey.from_public_bytes(base64.b64decode(member.sealing))
        wraps = [
            Wrap.of(block, wrap(keys.key(block), public, block_info(roster.cluster, model, block, node)))
            for block in sorted(blocks)
        ]
        found.append(NodeKeys(model=model, node=node, wraps=tuple(wraps)))
    return tuple(found)


class KeyHolder:
    """Hands out the keys beside an orchestrator's store."""

    def __init__(self, store: Store, identity: Identity, now: Callable[[], datetime]) -> None:
        self._store = store
        self._identity = identity
        self._now = now

    def with_keys(self, event: PlanEvent) -> PlanEvent:
        """`event` with the keys that its nodes need: those that cannot be read are left out, and its nodes will say
        what they lack."""
        roster = self._identity.roster
        models: dict[Digest, ModelKeys] = {}
        for model in {plan.model for plan in event.plans}:
            if not has_keys(self._store, model):
                continue  # a model in the open
            try:
                models[model] = read_keys(self._store, model)
            except ResplitError as error:
                log.warning("no keys come with a plan of %s: %s", event.deployment, error.message)
        if not models:
            return event
        return event.model_copy(update={"keys": keys_for(hosts(event, roster, self._now()), roster, models) or None})

    def check(self, model: Digest, manifest: Manifest) -> None:
        """Raise `ResplitError(MISSING_KEYS)`, or CORRUPT_FILE, where `model` is sealed and its keys are not here."""
        if manifest.is_sealed and len(read_keys(self._store, model).keys) != len(manifest.blocks):
            message = f"the keys of model {model} are not those of its {len(manifest.blocks)} blocks"
            raise ResplitError(ErrorCode.CORRUPT_FILE, f"{message}; bring them again from where it was sealed", "model")

"""Heartbeats as they travel: one signature over what everybody may know and over letters to those who need more.

The orchestrators of the roster get all of a node's capacity, each ingress what the node runs for it
(`schemas.heartbeat`). A letter is about its node, process and number, so that it opens as no other heartbeat's. Which
ingresses a node tells is in the open, as it is in plan events.
"""

from collections.abc import Callable, Collection
from typing import TypeVar

from bus.identity import Identity
from bus.letterbox import letter_to, letters_to
from bus.letters import About
from schemas.base import DeploymentName, NodeId, NodeName
from schemas.capacity import Capacity
from schemas.codec import decode, encode
from schemas.envelope import HEARTBEAT_TYPE, open_envelope, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.heartbeat import Heartbeat, Hosting, hostings_of, presence_of

CAPACITY, HOSTING = "capacity", "hosting"
"""What letters to orchestrators and to ingresses are about."""

V = TypeVar("V", Capacity, Hosting)


def seal_heartbeat(
    capacity: Capacity, ingresses: Callable[[DeploymentName], Collection[NodeName]], identity: Identity
) -> bytes:
    """`capacity`, signed by its node `identity`; `ingresses` are those of a deployment."""
    parts = hostings_of(capacity, ingresses)
    told = {encode(part): [NodeId(name) for name in names if name in identity.agents] for part, names in parts}
    heartbeat = Heartbeat(
        **dict(presence_of(capacity)),
        letters=(
            *letters_to({encode(capacity): identity.orchestrators}, identity, _about(CAPACITY, capacity)),
            *letters_to(told, identity, _about(HOSTING, capacity)),
        ),
    )
    return seal(heartbeat, HEARTBEAT_TYPE, identity.name, identity.key)


def open_heartbeat(data: bytes, identity: Identity) -> Heartbeat:
    """What a node signed about itself. Raises as `open_envelope` does, and BAD_SIGNATURE where it is another's."""
    heartbeat, signer = open_envelope(data, Heartbeat, HEARTBEAT_TYPE, identity.agents)
    if heartbeat.node != signer:
        raise ResplitError(ErrorCode.BAD_SIGNATURE, f"{signer!r} speaks for another node")
    return heartbeat


def read_capacity(heartbeat: Heartbeat, identity: Identity) -> Capacity | None:
    """All of it, for an orchestrator; None where nothing is for this one. Raises as `letter_to` does, and
    INVALID_REQUEST for another heartbeat's."""
    capacity = _read(heartbeat, identity, CAPACITY, Capacity)
    if capacity is not None and presence_of(capacity) != presence_of(heartbeat):
        message = f"heartbeat {heartbeat.sequence} of {heartbeat.node!r} says something else to everybody"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "letters")
    return capacity


def read_hosting(heartbeat: Heartbeat, identity: Identity) -> Hosting | None:
    """What it says to this ingress; None where nothing is for it. Raises as `letter_to` does."""
    return _read(heartbeat, identity, HOSTING, Hosting)


def _read(heartbeat: Heartbeat, identity: Identity, kind: str, holds: type[V]) -> V | None:
    plain = letter_to(heartbeat.letters, identity, _about(kind, heartbeat))
    return None if plain is None else decode(holds, plain, f"{kind} for {identity.name!r}")


def _about(kind: str, of: Capacity | Heartbeat) -> About:
    return About(kind, DeploymentName("-"), f"{of.boot}.{of.sequence}", of.node)

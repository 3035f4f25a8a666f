"""The fallback where no direct link exists: frames over the bus, in signed pieces.

Anyone on the bus may publish to a node's activation subject, so each piece carries its sender's Ed25519
signature over its destination, its place and its bytes.
"""

import asyncio
import itertools
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgpack
from cryptography.exceptions import InvalidSignature
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus.keys import Identity
from schemas import subjects
from schemas.base import NodeId
from schemas.envelope import pae
from schemas.framing import MAX_FRAME_BYTES

PIECE_BYTES = 512 << 10
PIECE_TYPE = "application/vnd.resplit.activation.v1"
ASSEMBLIES_MAX = 64
"""Frames in the middle of arriving; an older one whose pieces stopped coming makes room."""
PIECES_MAX = MAX_FRAME_BYTES // PIECE_BYTES

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Assembly:
    total: int
    pieces: dict[int, bytes] = field(default_factory=dict)


class BusRoad:
    """Sends and receives frames through the broker."""

    def __init__(
        self,
        client: Client,
        identity: Identity,
        receive: Callable[[NodeId, memoryview], None],
        unreachable: Callable[[NodeId], None],
    ) -> None:
        """`unreachable` is told when the broker answers that a node does not listen."""
        self._client = client
        self._identity = identity
        self._receive = receive
        self._unreachable = unreachable
        self._numbers = itertools.count(secrets.randbits(62))  # no number of an earlier life comes again
        self._assemblies: OrderedDict[tuple[NodeId, int], _Assembly] = OrderedDict()
        self._bounce = client.new_inbox()

    async def start(self) -> None:
        """Listen for frames, and for the broker's word that a destination does not."""
        await self._client.subscribe(subjects.activation(self._identity.name), cb=self._arrived)
        await self._client.subscribe(f"{self._bounce}.*", cb=self._bounced)

    async def send(self, node: NodeId, pieces: list[bytes | memoryview]) -> None:
        """Publish one frame to `node`."""
        data = b"".join(pieces)
        number = next(self._numbers)
        total = max(1, -(-len(data) // PIECE_BYTES))
        for i in range(total):
            part = data[i * PIECE_BYTES : (i + 1) * PIECE_BYTES]
            body: bytes = msgpack.packb([self._identity.name, node, number, i, total, part])
            signature = self._identity.key.sign(pae(PIECE_TYPE, body))
            await self._client.publish(subjects.activation(node), signature + body, reply=f"{self._bounce}.{node}")
            await asyncio.sleep(0)

    async def probe(self, node: NodeId) -> None:
        """Ask the broker whether anybody listens for `node`; silence means somebody does."""
        await self._client.publish(subjects.activation(node), b"", reply=f"{self._bounce}.{node}")

    async def _arrived(self, msg: Msg) -> None:
        if not msg.data:
            return  # a probe
        opened = self._verified(msg.data)
        if opened is None:
            return
        sender, number, i, total, part = opened
        assembly = self._assemblies.setdefault((sender, number), _Assembly(total))
        assembly.pieces[i] = part
        if len(assembly.pieces) == assembly.total:
            del self._assemblies[sender, number]
            self._receive(sender, memoryview(b"".join(assembly.pieces[k] for k in range(total))))
        elif len(self._assemblies) > ASSEMBLIES_MAX:
            self._assemblies.popitem(last=False)

    def _verified(self, data: bytes) -> tuple[NodeId, int, int, int, bytes] | None:
        signature, body = data[:64], data[64:]
        try:
            sender, destination, number, i, total, part = msgpack.unpackb(body, max_ext_len=0)
            self._identity.nodes[sender].verify(signature, pae(PIECE_TYPE, body))
        except (InvalidSignature, KeyError, ValueError, TypeError, msgpack.UnpackException):
            log.warning("dropped an activation without a valid signature")
            return None
        if destination != self._identity.name or not (0 <= i < total <= PIECES_MAX):
            log.warning("dropped an activation that was not meant for this node: %s", destination)
            return None
        return NodeId(sender), number, i, total, part

    async def _bounced(self, msg: Msg) -> None:
        if msg.headers and msg.headers.get("Status") == "503":
            self._unreachable(NodeId(msg.subject.rsplit(".", 1)[-1]))

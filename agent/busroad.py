"""The fallback where no direct link exists: frames over the bus, in signed pieces that only their destination opens.

Anyone on the bus may publish to a node's activation subject, so each piece carries its sender's Ed25519
signature over its destination, its place and its bytes. And anyone may hear it, so its bytes are a letter
(`bus.letters`): what a frame carries is tokens, or can be inverted to them.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgpack
from cryptography.exceptions import InvalidSignature
from nats.aio.client import Client
from nats.aio.msg import Msg

from agent.bounces import Bounces
from bus.identity import Identity
from bus.letters import About, open_letter, seal_letter
from profiler.links import LinkHistory
from schemas import subjects
from schemas.base import DeploymentName, NodeId
from schemas.envelope import pae
from schemas.errors import ResplitError
from schemas.flat import read_flat
from schemas.framing import MAX_FRAME_BYTES
from schemas.roster import sealing_key

PIECE_BYTES = 512 << 10
PIECE_TYPE = "application/vnd.resplit.activation.v1"
ASSEMBLIES_MAX = 64
"""Frames in the middle of arriving; an older one whose pieces stopped coming makes room."""
PIECES_MAX = MAX_FRAME_BYTES // PIECE_BYTES
PINGS_MAX = 256
"""Pings over the bus whose answers are awaited; the oldest are given up first."""
ANSWER_LATEST_S = 12.0
"""A peer that was pinged over the bus and did not answer for this long counts as not reached over it."""
INBOX = "_INBOX."
"""Where a probe may ask to be answered: anybody may send one, and must not make this node speak elsewhere."""

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
        used: Callable[[NodeId], None],
    ) -> None:
        """`unreachable` is told when the broker answers that a node does not listen; `used`, before each frame is
        received, whose it is. An empty frame, which only says that its sender goes this way, is not received."""
        self._client = client
        self._identity = identity
        self._receive = receive
        self._used = used
        self._bounces = Bounces(client, lambda node: unreachable(NodeId(node)))
        self._numbers = itertools.count(secrets.randbits(62))  # no number of an earlier life comes again
        self._assemblies: OrderedDict[tuple[NodeId, int], _Assembly] = OrderedDict()
        self._pongs = client.new_inbox()
        self._pinged: OrderedDict[str, tuple[NodeId, float]] = OrderedDict()
        self._histories: dict[NodeId, LinkHistory] = {}

    async def start(self) -> None:
        """Listen for frames, for answers to pings, and for the broker's word that a destination does not listen."""
        await self._client.subscribe(subjects.activation(self._identity.name), cb=self._arrived)
        await self._bounces.start()
        await self._client.subscribe(f"{self._pongs}.*", cb=self._ponged)

    async def send(self, node: NodeId, pieces: list[bytes | memoryview]) -> None:
        """Publish one frame to `node`."""
        member = self._identity.member(node)
        if member is None:
            log.warning("a frame was for %s, which does not belong to the cluster any more", node)
            return
        reader = {node: sealing_key(member)}
        data = b"".join(pieces)
        number = next(self._numbers)
        total = max(1, -(-len(data) // PIECE_BYTES))
        back = self._bounces.address(node)
        for i in range(total):
            part = data[i * PIECE_BYTES : (i + 1) * PIECE_BYTES]
            letter = seal_letter(part, reader, _about(self._identity.name, number, i, total))
            body: bytes = msgpack.packb([self._identity.name, node, number, i, total, letter])
            signature = self._identity.key.sign(pae(PIECE_TYPE, body))
            await self._client.publish(subjects.activation(node), signature + body, reply=back)
            await asyncio.sleep(0)

    async def probe(self, node: NodeId) -> None:
        """Ask the broker whether anybody listens for `node`; silence means somebody does."""
        await self._client.publish(subjects.activation(node), b"", reply=self._bounces.address(node))

    async def ping(self, node: NodeId) -> None:
        """Measure the round trip through the broker; `history` has it when the answer comes."""
        number = secrets.token_hex(16)  # who got one ping cannot answer another
        self._pinged[number] = (node, time.monotonic())
        if len(self._pinged) > PINGS_MAX:
            self._pinged.popitem(last=False)
        await self._client.publish(subjects.activation(node), b"", reply=f"{self._pongs}.{number}")

    def history(self, node: NodeId) -> LinkHistory:
        """What pings of `node` over the bus measured. Round trips only: goodput is the broker's to share out."""
        return self._histories.get(node, LinkHistory())

    async def _ponged(self, msg: Msg) -> None:
        node, sent_s = self._pinged.pop(msg.subject.rsplit(".", 1)[-1], (None, 0.0))
        if node is not None and not msg.headers:  # with a header it is the broker: nobody listens
            self._histories[node] = self.history(node).round_trip(sent_s, time.monotonic())

    async def _arrived(self, msg: Msg) -> None:
        if not msg.data:
            if msg.reply.startswith(INBOX):  # a probe, or a ping
                await self._client.publish(msg.reply, b"")
            return
        opened = self._opened(msg.data)
        if opened is None:
            return
        sender, number, i, total, part = opened
        assembly = self._assemblies.setdefault((sender, number), _Assembly(total))
        if assembly.total != total:
            log.warning("dropped a piece of an activation that is not in as many pieces as it was: %s", sender)
            return
        assembly.pieces[i] = part
        if len(assembly.pieces) == assembly.total:
            del self._assemblies[sender, number]
            self._used(sender)
            if frame := b"".join(assembly.pieces[k] for k in range(total)):
                self._receive(sender, memoryview(frame))
        elif len(self._assemblies) > ASSEMBLIES_MAX:
            self._assemblies.popitem(last=False)

    def _opened(self, data: bytes) -> tuple[NodeId, int, int, int, bytes] | None:
        signature, body = data[:64], data[64:]
        match read_flat(body, 6):
            case [str(sender), str(destination), int(number), int(i), int(total), bytes(letter)]:
                pass
            case _:
                log.warning("dropped what is no piece of an activation")
                return None
        key = self._identity.agents.get(NodeId(sender))
        try:
            if key is None:
                raise InvalidSignature
            key.verify(signature, pae(PIECE_TYPE, body))
        except InvalidSignature:
            log.warning("dropped an activation without a valid signature")
            return None
        if destination != self._identity.name or not (0 <= i < total <= PIECES_MAX):
            log.warning("dropped an activation that was not meant for this node: %s", destination)
            return None
        try:
            part = open_letter(
                letter, self._identity.name, self._identity.sealing, _about(NodeId(sender), number, i, total)
            )
        except ResplitError as error:
            log.warning("dropped an activation that does not open: %s", error)
            return None
        return NodeId(sender), number, i, total, part


def _about(sender: NodeId, number: int, i: int, total: int) -> About:
    return About("activation", DeploymentName("-"), f"{number}.{i}.{total}", sender)

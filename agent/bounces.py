"""Return addresses at which NATS says that nobody listens where a message went.

Whoever gets a message reads its return address, and members of one kind may write to each other's inboxes: answers go
that way. So each address carries a proof over what it is about, which only its process can make: who got a message may
say that it is gone itself, and nothing of others.
"""

import hmac
import secrets
from collections.abc import Callable
from hashlib import blake2b

from nats.aio.client import Client
from nats.aio.msg import Msg

NO_RESPONDERS = "503"
PROOF_BYTES = 16


class Bounces:
    """Hears who does not listen."""

    def __init__(self, client: Client, on_gone: Callable[[str], None]) -> None:
        """`on_gone` gets what the address of a message that nobody heard was made for."""
        self._client = client
        self._on_gone = on_gone
        self._inbox = client.new_inbox()
        self._key = secrets.token_bytes(PROOF_BYTES)

    async def start(self) -> None:
        """Listen."""
        await self._client.subscribe(f"{self._inbox}.*.*", cb=self._bounced)

    def address(self, about: str) -> str:
        """Where to answer a message about somebody or something; its name is one word of a subject."""
        return f"{self._inbox}.{about}.{self._proof(about)}"

    def _proof(self, about: str) -> str:
        return blake2b(about.encode(), digest_size=PROOF_BYTES, key=self._key).hexdigest()

    async def _bounced(self, msg: Msg) -> None:
        if (msg.headers or {}).get("Status") != NO_RESPONDERS:
            return
        *_, about, proof = msg.subject.split(".")
        if hmac.compare_digest(proof.encode(), self._proof(about).encode()):
            self._on_gone(about)

"""A local cluster with a login for the owner of its server, who is bound by no list: whoever has the machine can write
one into the file of logins, and do to the cluster what no member may."""

import base64
import json
import re
import secrets
import ssl
from typing import Any

import nkeys
from nats.aio.client import Client as Nats

from bus.credentials import SEED_BYTES, Account, nkey_seed, public_nkey
from bus.identity import load_credentials
from natstls.client import SafeClient
from natstls.patience import Backoff
from resplit.cluster import LocalCluster

SOON = Backoff(0.1, 0.1)
ACCOUNTS: tuple[Account, ...] = ("CONTROL", "EDGE")


class OwnedCluster(LocalCluster):
    """The cluster, its members' logins as they are generated, and the owner's in each account."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._provoked: list[str] = []
        self._denied: dict[str, tuple[str, ...]] = {}
        self._seeds = {account: nkey_seed(secrets.token_bytes(SEED_BYTES)) for account in ACCOUNTS}

    async def owner(self, account: Account) -> Nats:
        """A connection that may do everything in `account`."""
        client = SafeClient()
        await client.connect(
            self.url.split(","),
            nkeys_seed_str=self._seeds[account],
            tls=self.tls,
            tls_handshake_first=True,
            backoff=SOON,
        )
        return client

    @property
    def tls(self) -> ssl.SSLContext:
        """With what the owner reaches the server: the operator's certificate."""
        return load_credentials(self.operator_keys).tls

    def refusals(self) -> list[str]:
        """What the server refused its members, in its own words, but for what was provoked."""
        logs = [self.log(name).read_text() for name in self._servers]
        lines = [line for text in logs for line in text.splitlines() if "Violation" in line]
        return [line for line in lines if not any(subject in line for subject in self._provoked)]

    def provoke(self, subject: str) -> None:
        """A test will have members try to publish to `subject`, which they may not."""
        self._provoked.append(f'Publish Violation - Subject "{subject}"')

    async def deny(self, member: str, *subjects: str) -> None:
        """From now on the server carries none of these subjects to or from `member`, which its roster lets it use; none
        named: it carries all again."""
        self._denied[member] = subjects
        self._provoked += [f'Violation - Subject "{subject}"' for subject in subjects]
        await self.reload()

    def raw_login(self, greeting: bytes) -> bytes:
        """CONNECT at the edge, for who speaks NATS' own protocol; `greeting`: the server's INFO."""
        seed = self._seeds["EDGE"]
        nonce: str = json.loads(greeting.removeprefix(b"INFO "))["nonce"]
        signed = nkeys.from_seed(bytearray(seed.encode())).sign(nonce.encode())
        said = {
            "headers": True,
            "nkey": public_nkey(seed),
            "sig": base64.urlsafe_b64encode(signed).decode().rstrip("="),
        }
        return b"CONNECT " + json.dumps(said).encode() + b"\r\n"

    def _logins(self) -> str:
        text = super()._logins()
        for account, seed in self._seeds.items():
            before, named, after = text.partition(f"  {account} {{")
            opened = "    users: [\n"
            text = before + named + after.replace(opened, f"{opened}    {{ nkey: {public_nkey(seed)} }}\n", 1)
        for member, denied in self._denied.items():
            [(before, after)] = re.findall(rf"(?s)^(.*?# \w+ {member}\n)(.*)$", text)
            own, end, others = after.partition("allow_responses")
            kept = [line for line in own.splitlines() if not any(f'"{subject}"' in line for subject in denied)]
            text = before + "\n".join(kept) + end + others
        return text

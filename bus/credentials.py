"""PURE: who may log in to the bus, and with what: one NKey and one inbox for each member of a cluster.

The server knows the public key (`Login`); the member proves with its seed that the key is its own (`Credentials`),
and the seed never travels. Seeds are made and read with the package `nkeys`.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import nkeys

from schemas.base import NodeId, NodeName, SiteName, Value
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import BusKey, Role, Roster

Account = Literal["CONTROL", "EDGE"]
"""Messages of one account do not reach the other, but for what `bus.permissions` lists. Those who steer and watch the
cluster are in CONTROL, with everything that JetStream keeps; those who serve and ask are at the EDGE."""
ACCOUNT_OF: Mapping[Role, Account] = {
    "orchestrator": "CONTROL",
    "operator": "CONTROL",
    "observer": "CONTROL",
    "archivist": "CONTROL",
    "agent": "EDGE",
    "client": "EDGE",
}
API_OF: Mapping[Account, str] = {"CONTROL": "$JS.API", "EDGE": "resplit.v1.api"}
"""What the subjects of JetStream's API begin with in an account."""

SEED_BYTES = 32


def inbox_prefix(role: Role, name: NodeId) -> str:
    """What the inboxes of a member begin with; nobody else may hear them."""
    return f"_INBOX.{role}.{name}"


class Login(Value):
    """One member as the server knows it."""

    name: NodeName
    role: Role
    nkey: BusKey
    """The public NKey of a user (`U...`)."""
    home: SiteName | None = None
    """As `Member.home`: an orchestrator is let in there alone, and an agent's trail is there."""


def logins_of(roster: Roster) -> tuple[Login, ...]:
    """Who may log in: the members of `roster` but for those whose time was over when it was signed. A server does not
    look at clocks: whose time ends later is out with the roster's next version."""
    current = (member for member in roster.members if member.not_after > roster.issued_at)
    return tuple(Login(name=one.name, role=one.role, nkey=one.bus, home=one.home) for one in current)


class NatsOptions(TypedDict):
    """Arguments of nats-py's `connect`."""

    nkeys_seed_str: str
    inbox_prefix: str
    tls: ssl.SSLContext
    tls_handshake_first: bool


@dataclass(frozen=True)
class Credentials:
    """One member as it knows itself. Raises `ResplitError(INVALID_REQUEST)` for a seed that is damaged."""

    name: NodeId
    role: Role
    seed: str = field(repr=False)
    """`SU...`, secret."""
    tls: ssl.SSLContext = field(repr=False, compare=False)
    """By what the server is known, and who asks shown to it (`bus.tls`)."""

    def __post_init__(self) -> None:
        self.login  # noqa: B018 (a seed that is damaged is found here, not as a login that nobody knows)

    @property
    def login(self) -> Login:
        """What the server has to know of it."""
        return Login(name=self.name, role=self.role, nkey=public_nkey(self.seed))

    @property
    def api_prefix(self) -> str:
        """What its questions to JetStream begin with: the `prefix` of nats-py's `jetstream`."""
        return API_OF[ACCOUNT_OF[self.role]]

    @property
    def nats_options(self) -> NatsOptions:
        """What nats-py's `connect` is to be told, `resplit.Client(nats_options=...)` too."""
        return {
            "nkeys_seed_str": self.seed,
            "inbox_prefix": inbox_prefix(self.role, self.name),
            "tls": self.tls,
            # Before the first word: a server that is asked whether it has TLS can be answered for.
            "tls_handshake_first": True,
        }


def nkey_seed(raw: bytes) -> str:
    """The seed of a user made from 32 random bytes."""
    assert len(raw) == SEED_BYTES, f"a seed is made of {SEED_BYTES} random bytes"
    seed: bytes = nkeys.encode_seed(raw, nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def public_nkey(seed: str) -> str:
    """The public key of a seed; raises `ResplitError(INVALID_REQUEST)`, which does not repeat it, if it is damaged."""
    try:
        prefix, raw = nkeys.decode_seed(bytearray(seed.encode()))
        # The package takes a seed with a changed letter for another seed: its own checksum is left unread.
        if prefix != nkeys.PREFIX_BYTE_USER or nkey_seed(bytes(raw)) != seed:
            raise ValueError
        public: bytes = nkeys.from_seed(bytearray(seed.encode())).public_key
    except (ValueError, AssertionError, nkeys.NkeysError) as error:
        message = "this is not the NKey seed of a user (SU...); copy the whole file that enrolment wrote"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "seed") from error
    return public.decode()

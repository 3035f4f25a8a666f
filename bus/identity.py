"""Who a process is, and who else belongs to the cluster as its root says now.

A process works from its member's folder (`bus.joining`). The roster in it is where it begins; newer ones reach it over
the bus (`bus.following`), and whom it believes changes with them while it runs.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from bus.certificates import UNREADABLE, common_names, fingerprint
from bus.credentials import Credentials
from bus.folders import KNOWN, ROSTER, keep_roster, missing, read_file, read_root
from bus.remembered import recall, remember
from natstls.contexts import link_context, server_context
from schemas.base import DeploymentName, Digest, Home, NodeId, SiteId, called, home_of
from schemas.beacon import Beacon, after_beacon
from schemas.errors import ErrorCode, ResplitError
from schemas.known import BeaconSeen, Known, after_plan, after_roster, held, root_of
from schemas.roster import WRITERS, Member, Role, RootKeys, Roster, open_roster, public_key, spelled

ORCHESTRATOR = NodeId("orchestrator")
"""The name under which the orchestrators of the hub are members: all have the same keys."""

BEACONS_PER_WRITE = 30
"""One beacon of so many is on the disk: to a process that starts again those of a minute at most can be shown twice."""

Keys = Mapping[NodeId, Ed25519PublicKey]


def _now() -> datetime:
    return datetime.now(UTC)


class Identity:
    """One member's name and its keys for signing and for what is sealed to it, and whom it believes now."""

    def __init__(
        self,
        name: NodeId,
        key: Ed25519PrivateKey,
        sealing: X25519PrivateKey,
        folder: Path,
        known: Known,
        roster: Roster,
        now: Callable[[], datetime] = _now,
    ) -> None:
        """`known` is what is on the disk; `roster` the one that it names."""
        self.name = name
        self.key = key
        self.sealing = sealing
        self.folder = folder
        self._known = known
        self._on_disk = known
        self._now = now
        self._writing = asyncio.Lock()
        self._by_role: dict[Role, dict[NodeId, Ed25519PublicKey]] = {}
        self._believe(roster)

    @property
    def root(self) -> RootKeys:
        """Who signs rosters."""
        return self._known.root

    @property
    def known(self) -> Known:
        """What was seen so far."""
        return self._known

    @property
    def orchestrators(self) -> Keys:
        """Whose plans are obeyed, of deployments at home where they steer (`check_steers`)."""
        return self._of("orchestrator")

    def steering(self, home: Home) -> Keys:
        """Who steers the deployments of `home`."""
        return {name: key for name, key in self.orchestrators.items() if self._home_of(name) == home}

    def check_steers(self, signer: NodeId, deployment: DeploymentName, home: Home) -> None:
        """That a word of the orchestrator `signer` about `deployment`, from the control plane of `home`, is of that
        home; raises `ResplitError(FORBIDDEN)`."""
        at, steers = home_of(deployment), self._home_of(signer)
        if not at == steers == home:
            message = (
                f"{signer!r} steers the deployments of {called(steers)}, and spoke at {called(home)} of "
                f"{deployment!r}, which is at home at {called(at)}"
            )
            raise ResplitError(ErrorCode.FORBIDDEN, message, "deployment")

    @property
    def home(self) -> Home:
        """Of an orchestrator, the home whose deployments it steers; of an agent, the one whose trail it writes."""
        return self._home_of(self.name)

    @property
    def agents(self) -> Keys:
        """Whose capacity, receipts and pieces are believed."""
        return self._of("agent")

    def member(self, name: NodeId) -> Member | None:
        """Who is called `name`, if it is their time."""
        found = self.roster.member(name)
        return found if found is not None and found.is_current(self._now()) else None

    def is_stale(self) -> bool:
        """Whether the roster has expired: its holders forgot it, or somebody keeps the newest from this process."""
        return self._now() >= self.roster.expires_at

    def peer(self, certificate: bytes | None) -> NodeId | None:
        """The agent that a peer's verified certificate (DER) is of; None for one that the roster does not name.

        The authority's signature says that a key goes by a name, and the roster that it still does.
        """
        if certificate is None:
            return None
        try:
            parsed = x509.load_der_x509_certificate(certificate)
            names, shown = common_names(parsed), fingerprint(parsed.public_key())
        except UNREADABLE:
            return None
        member = self.member(NodeId(names[0])) if len(names) == 1 else None
        return NodeId(member.name) if member is not None and member.role == "agent" and member.link == shown else None

    def tls(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """A TLS 1.3 context that shows this identity and demands one of the same authority from the peer."""
        with _typed():
            return link_context(self.folder, self.name, purpose)

    async def take_roster(self, data: bytes) -> bool:
        """Believe a roster; on the disk before it counts. Whether it is news. Errors are those of `after_roster`."""
        async with self._writing:
            now = self._now()
            known = after_roster(self._known, data, now)
            if known == self._known:
                return False
            await asyncio.to_thread(keep_roster, self.folder, known, data)
            self._kept(known)
            self._believe(open_roster(known.root, data))
            return True

    async def take_plan(self, deployment: DeploymentName, term: int, revision: int, digest: Digest) -> None:
        """Remember a plan event, of this SHA-256, before it is acted upon. Errors are those of `after_plan`."""
        async with self._writing:
            await self._keep(after_plan(self._known, deployment, term, revision, digest))

    async def take_beacon(self, beacon: Beacon, home: Home = None) -> None:
        """Remember a beacon of `home`, on the disk only now and then. Errors are those of `after_beacon`."""
        async with self._writing:
            known = after_beacon(self._known, beacon, home)
            if _is_due(beacon, self._on_disk.steering(home).beacon):
                await self._keep(known)
            else:
                self._known = known

    async def _keep(self, known: Known) -> None:
        if known != self._known:
            await asyncio.to_thread(remember, self.folder / KNOWN, known)
            self._kept(known)

    def _kept(self, known: Known) -> None:
        self._known = self._on_disk = known

    def _home_of(self, name: NodeId) -> Home:
        found = self.roster.member(name)
        return None if found is None or found.home is None else SiteId(found.home)

    def _believe(self, roster: Roster) -> None:
        self.roster = roster
        own = roster.member(self.name)
        self.is_out = own is None or own.signing != spelled(self.key.public_key())
        """Whether the roster does not have this process's key any more: nobody believes what it signs."""
        self.writers: Keys = writers(roster)
        """Whose audit events are believed."""
        self._until: datetime | None = None

    def _of(self, role: Role) -> Keys:
        now = self._now()
        if self._until is None or now >= self._until:
            # Who belongs changes with the roster, and where somebody's time begins or ends.
            times = [time for member in self.roster.members for time in (member.not_before, member.not_after)]
            self._until = min((time for time in times if time > now), default=datetime.max.replace(tzinfo=UTC))
            self._by_role = {}
            for member in self.roster.members:
                if member.is_current(now):
                    self._by_role.setdefault(member.role, {})[NodeId(member.name)] = public_key(member.signing)
        return self._by_role.get(role, {})


def orchestrator_of(home: Home) -> NodeId:
    """The name under which the orchestrators of `home` are members: all of a home are one."""
    return ORCHESTRATOR if home is None else NodeId(f"{ORCHESTRATOR}-{home}")


def _is_due(beacon: Beacon, on_disk: BeaconSeen | None) -> bool:
    return on_disk is None or beacon.term > on_disk.term or beacon.number >= on_disk.number + BEACONS_PER_WRITE


def read_roster(folder: Path) -> Roster:
    """The roster in a member's folder or the cluster's, verified by the root there; no private key is needed.

    Raises `ResplitError` naming the file that is missing or bad.
    """
    known, data = recall(folder / KNOWN) or read_root(folder), read_file(folder / ROSTER)
    return open_roster(root_of(known.root, data), data)


def load_credentials(folder: Path) -> Credentials:
    """With what the member whose folder this is logs in to the bus, and knows the server.

    Raises `ResplitError` naming the file that is missing or bad, and FORBIDDEN for who does not belong any more.
    """
    found = sorted(folder.glob("*.nk"))
    if len(found) != 1:
        held = f"{len(found)} logins" if found else "no login"
        message = f"{folder} holds {held} (NAME.nk); give the folder of one member, made with `resplit join`"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "keys")
    name = NodeId(found[0].stem)
    member = read_roster(folder).member(name)
    if member is None:
        message = f"the roster in {folder} does not name {name!r} any more; have it enrolled again, and join"
        raise ResplitError(ErrorCode.FORBIDDEN, message, "keys")
    seed = read_file(found[0]).decode("ascii", "replace")
    with _typed():
        return Credentials(name, member.role, seed, server_context(folder, name))


def writers(roster: Roster) -> dict[NodeId, Ed25519PublicKey]:
    """Whose audit events are believed: agents and orchestrators, whatever their time. What a member signed while it
    belonged stays true."""
    return {NodeId(m.name): public_key(m.signing) for m in roster.members if m.role in WRITERS}


def load_identity(folder: Path, name: NodeId, now: Callable[[], datetime] = _now) -> Identity:
    """Who `name` is, by its member's folder; raises `ResplitError` naming the file that is missing or bad, and what
    `after_roster` raises where the roster in it is not the one that was last taken."""
    known = recall(folder / KNOWN)
    if known is None:
        raise missing(folder / KNOWN, "no such file")
    key = _private_key(folder / f"{name}.key")
    if not isinstance(key, Ed25519PrivateKey):
        raise ResplitError(ErrorCode.CORRUPT_FILE, f"{folder / f'{name}.key'} is not an Ed25519 key")
    sealing = _private_key(folder / f"{name}.sealing.key")
    if not isinstance(sealing, X25519PrivateKey):
        raise ResplitError(ErrorCode.CORRUPT_FILE, f"{folder / f'{name}.sealing.key'} is not an X25519 key")
    seen, roster = held(known, read_file(folder / ROSTER))
    if seen != known:
        remember(folder / KNOWN, seen)
    return Identity(name, key, sealing, folder, seen, roster, now)


def _private_key(path: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(read_file(path), password=None)
    except ValueError as error:
        raise ResplitError(ErrorCode.CORRUPT_FILE, f"{path} is not a private key") from error


@contextmanager
def _typed() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ResplitError(ErrorCode.INVALID_REQUEST, str(error), "keys") from error

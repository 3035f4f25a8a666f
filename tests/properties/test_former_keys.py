"""An event counts by the key that its writer had when it was written, and a key that left vouches for nothing new."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.credentials import nkey_seed, public_nkey
from resplit.chain import Flaw, verify
from resplit.standing import Reader, Standing, trust_of
from schemas.audit import AuditEvent, AuditKind, Checkpoint
from schemas.base import NodeId
from schemas.codec import decode, encode
from schemas.envelope import AUDIT_TYPE, seal
from schemas.roster import ClusterId, Member, Roster, former_after, spelled

NOW = datetime(2026, 7, 1, tzinfo=UTC)
DAY = timedelta(days=1)
NAMES = [NodeId("n0"), NodeId("n1"), NodeId("n2")]
FOLLOWED = settings(max_examples=100, deadline=None)
CHANGES = ("enrol", "rotate", "revoke")
WORDS = ("take", "checkpoint")
"""Events that say which roster is in force."""
STEPS = st.lists(
    st.tuples(st.sampled_from([*CHANGES, *WORDS, "tell", "tell"]), st.sampled_from(NAMES)), min_size=1, max_size=40
)


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(sha256(b"%d" % number).digest())


def member(name: NodeId, number: int) -> Member:
    raw = sha256(b"%d" % number).digest()
    return Member(
        name=name,
        role="agent",
        tier="edge",
        signing=spelled(key(number).public_key()),
        sealing=spelled(key(number).public_key()),
        bus=public_nkey(nkey_seed(raw)),
        link=raw.hex(),
        not_before=NOW,
        not_after=NOW + 365 * DAY,
    )


def event(name: NodeId, number: int, what: str = "tell", version: int = 0, at: datetime = NOW) -> bytes:
    kind = {"take": AuditKind.ROSTER_TAKEN, "checkpoint": AuditKind.CHECKPOINT}.get(what, AuditKind.LINK_CHANGED)
    fields = {"version": version} if what == "take" else {}
    checkpoint = Checkpoint(count=0, root="0" * 64, roster=version) if what == "checkpoint" else None
    said = AuditEvent(at=at, source=name, kind=kind, message="a test", fields={**fields}, checkpoint=checkpoint)
    return seal(said, AUDIT_TYPE, name, key(number))


@dataclass
class World:
    """A cluster whose members come and go, and write only with a key that is in the newest roster."""

    roster: Roster = field(
        default_factory=lambda: Roster(
            cluster=ClusterId("a" * 32),
            root_version=1,
            version=1,
            issued_at=NOW,
            expires_at=NOW + DAY,
            authority="0" * 64,
        )
    )
    keys: dict[NodeId, int] = field(default_factory=dict)
    made: int = 0
    trail: list[bytes] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    """Which version of the roster each event of the trail says to be in force; 0: it says nothing of it."""
    out: dict[int, tuple[NodeId, int]] = field(default_factory=dict)
    """Of each key that left: whose it was, and the roster that took it out."""

    def step(self, what: str, name: NodeId) -> None:
        if what in CHANGES:
            self._change(what, name)
        elif name in self.keys:
            said = self.roster.version if what in WORDS else 0
            self.trail.append(event(name, self.keys[name], what, said))
            self.versions.append(said)

    def _change(self, what: str, name: NodeId) -> None:
        if (what == "enrol") == (name in self.keys):
            return
        if name in self.keys:
            self.out[self.keys.pop(name)] = name, self.roster.version + 1
        if what != "revoke":
            self.made += 1
            self.keys[name] = self.made
        members = tuple(member(one, number) for one, number in self.keys.items())
        former = former_after(self.roster, members, NOW)
        changed = {"version": self.roster.version + 1, "members": members, "former": former}
        self.roster = Roster.model_validate({**dict(self.roster), **changed})

    def in_force(self, position: int) -> int:
        """The newest roster of which the trail tells before `position`."""
        return max(self.versions[:position], default=0)


def lived(steps: Sequence[tuple[str, NodeId]]) -> World:
    world = World()
    for what, name in steps:
        world.step(what, name)
    return world


def standings(world: World, trail: Sequence[bytes]) -> list[Standing]:
    reader = Reader(trust_of(world.roster))
    return [reader.read(data).standing for data in trail]


@FOLLOWED
@given(steps=STEPS)
def test_what_was_true_when_it_was_written_stays_true_whoever_leaves(steps: list[tuple[str, NodeId]]) -> None:
    world = lived(steps)
    assert standings(world, world.trail) == ["verified"] * len(world.trail)


@FOLLOWED
@given(steps=STEPS)
def test_a_roster_names_every_key_that_left_and_by_which_roster(steps: list[tuple[str, NodeId]]) -> None:
    world = lived(steps)
    named = {(one.signing, one.name, one.out) for one in world.roster.former or ()}
    assert named == {(spelled(key(number).public_key()), *whose) for number, whose in world.out.items()}
    assert decode(Roster, encode(world.roster), "roster") == world.roster


@FOLLOWED
@given(steps=STEPS, data=st.data())
def test_a_key_that_left_vouches_for_nothing_behind_the_word_of_its_roster(
    steps: list[tuple[str, NodeId]], data: st.DataObject
) -> None:
    """Whoever has it may put an event anywhere, and date it as he likes: what he does not control are the others'."""
    world = lived([("enrol", NAMES[0]), ("tell", NAMES[0]), ("rotate", NAMES[0]), *steps])
    number = data.draw(st.sampled_from(sorted(world.out)))
    name, out = world.out[number]
    at = NOW + data.draw(st.integers(-1000, 1000)) * DAY
    position = data.draw(st.integers(0, len(world.trail)))
    trail = [*world.trail[:position], event(name, number, at=at), *world.trail[position:]]
    expected: list[Standing] = ["verified"] * len(trail)
    if world.in_force(position) >= out:
        expected[position] = "late"
    assert standings(world, trail) == expected
    flaws = [found.flaw for found in verify(trail, trust_of(world.roster)).findings if not found.is_declared]
    assert flaws == ([Flaw.LATE] if "late" in expected else [])


@FOLLOWED
@given(steps=STEPS, data=st.data())
def test_a_key_that_was_nobody_s_is_forged_wherever_it_stands(
    steps: list[tuple[str, NodeId]], data: st.DataObject
) -> None:
    world = lived(steps)
    position = data.draw(st.integers(0, len(world.trail)))
    forged = event(data.draw(st.sampled_from(NAMES)), 10**6, "take", version=10**6)
    found = standings(world, [*world.trail[:position], forged, *world.trail[position:]])
    assert found.pop(position) == "forged"
    assert found == ["verified"] * len(world.trail), "and says nothing of what is in force"


def test_what_is_late_says_by_which_roster_and_on_whose_word() -> None:
    steps = [("enrol", NAMES[0]), ("enrol", NAMES[1]), ("tell", NAMES[0]), ("revoke", NAMES[0]), ("take", NAMES[1])]
    world = lived(steps)
    reader = Reader(trust_of(world.roster))
    *_, late = [reader.read(data) for data in (*world.trail, event(NAMES[0], 1))]
    assert late.why == "its key was taken out by roster 4, and 'n1' had said before that roster 4 was in force"

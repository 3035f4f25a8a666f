"""What an agent makes of beacons: whatever comes in whatever order, it misses what is missing, says it once, and knows
whether anybody guides it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from agent.guidance import (
    GRACE_S,
    LOOK_AFTER_S,
    TICK_MAX_S,
    TICK_S,
    UNGUIDED_AFTER_S,
    Guided,
    Look,
    State,
    Step,
    Unguided,
    Withheld,
    heard,
    ticked,
)
from schemas.base import DeploymentName, Digest, NodeId
from schemas.beacon import BEACON_EVERY_S, PLANS_MAX, Beacon, after_beacon
from schemas.capacity import Guidance
from schemas.envelope import BEACON_TYPE, MAX_ENVELOPE_BYTES, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.known import JUMP_MAX, BeaconSeen, Known, PlanSeen, RosterSeen
from schemas.roster import ClusterId, RootKeys, spelled
from schemas.signed import key_id

CHAT, EMBED = DeploymentName("chat"), DeploymentName("embed")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
ROOT = RootKeys(
    cluster=ClusterId("0" * 32),
    version=1,
    keys={key_id(_KEY): spelled(_KEY)},
    threshold=1,
    issued_at=NOW,
    expires_at=NOW + timedelta(days=1),
)


SOME_BEACON = BeaconSeen(term=1, number=1)


def digest(number: int) -> Digest:
    return Digest(f"{number:064x}")


def plan(revision: int, term: int = 1) -> PlanSeen:
    return PlanSeen(term=term, revision=revision, digest=digest(1000 * term + revision))


def roster(version: int) -> RosterSeen:
    return RosterSeen(version=version, digest=digest(version))


def known(version: int = 1, beacon: BeaconSeen | None = SOME_BEACON, **plans: PlanSeen) -> Known:
    return Known(
        root=ROOT,
        roster=roster(version),
        plans={DeploymentName(name): one for name, one in plans.items()},
        beacon=beacon,
    )


def beacon(version: int = 1, term: int = 1, number: int = 1, **plans: PlanSeen) -> Beacon:
    named = {DeploymentName(name): one for name, one in plans.items()}
    return Beacon(term=term, number=number, issued_at=NOW, roster=roster(version), plans=named)


@dataclass
class Node:
    """An agent's guidance as its shell runs it."""

    known: Known
    state: State = field(default_factory=lambda: State(0.0))
    said: list[Step] = field(default_factory=list)
    now: float = 0.0

    def hear(self, found: Beacon) -> None:
        self.state, steps = heard(self.state, found, self.known)
        self.said += steps

    def wait(self, seconds: float, *, connected: bool = True) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            self.state, steps = ticked(self.state, self.known, connected=connected, now=self.now)
            self.said += steps

    def reports(self) -> Guidance | None:
        return self.state.guidance

    def told(self) -> list[Withheld]:
        return [step for step in self.said if isinstance(step, Withheld)]


def test_what_a_beacon_names_and_is_here_is_not_looked_for() -> None:
    node = Node(known(2, chat=plan(3)))
    for found in (beacon(2, chat=plan(3)), beacon(1, number=2, chat=plan(2)), beacon(2, number=3)):
        node.hear(found)
        node.wait(BEACON_EVERY_S)
    assert node.said == []
    assert node.reports() is None


def test_a_withheld_event_is_looked_for_at_once_and_said_once_after_the_grace() -> None:
    node = Node(known(chat=plan(3)))
    node.hear(beacon(chat=plan(4)))
    node.wait(LOOK_AFTER_S)
    assert node.said == [Look(CHAT)]
    node.wait(GRACE_S - 1)
    assert node.told() == []
    for number in range(2, 20):
        node.hear(beacon(number=number, chat=plan(4)))
        node.wait(BEACON_EVERY_S)
    assert [(step.thing, step.named) for step in node.told()] == [(CHAT, plan(4))]
    assert node.said.count(Look(CHAT)) == 1
    assert node.reports() == Guidance(withheld=(CHAT,))
    node.known = known(chat=plan(4))
    node.wait(TICK_S)
    assert node.reports() is None


def test_a_withheld_roster_is_said_with_its_version() -> None:
    node = Node(known(7))
    node.hear(beacon(9))
    node.wait(GRACE_S)
    assert [step.thing for step in node.told()] == [None]
    assert node.reports() == Guidance(withheld_roster=9)


def test_another_event_under_the_same_number_is_missed_too() -> None:
    node = Node(known(chat=plan(3).model_copy(update={"digest": digest(7)})))
    node.hear(beacon(chat=plan(3)))
    node.wait(GRACE_S)
    assert [step.named for step in node.told()] == [plan(3)]


def test_ever_newer_events_do_not_put_the_word_off_and_each_is_said_once() -> None:
    node = Node(known(chat=plan(1)))
    for number in range(1, 41):
        node.hear(beacon(number=number, chat=plan(1 + number)))
        node.wait(BEACON_EVERY_S)
        if number * BEACON_EVERY_S > GRACE_S + TICK_S:
            assert node.reports() == Guidance(withheld=(CHAT,))
    named = [step.named for step in node.told()]
    assert named == [plan(6)], "the later ones may each be on its way"
    node.wait(GRACE_S)
    assert [step.named for step in node.told()] == [plan(6), plan(41)]


def test_silence_is_said_once_and_so_is_its_end() -> None:
    node = Node(known())
    node.hear(beacon())
    node.wait(UNGUIDED_AFTER_S - TICK_S)
    assert node.reports() is None
    node.wait(10 * UNGUIDED_AFTER_S)
    assert node.said == [Unguided(UNGUIDED_AFTER_S)]
    assert node.reports() == Guidance(silent_s=11 * UNGUIDED_AFTER_S - TICK_S)
    node.hear(beacon(number=2))
    assert node.said[1:] == [Guided(11 * UNGUIDED_AFTER_S - TICK_S)]
    assert node.reports() is None


def test_a_node_that_never_heard_one_says_so_too() -> None:
    node = Node(known())
    node.wait(UNGUIDED_AFTER_S)
    assert node.said == [Unguided(UNGUIDED_AFTER_S)]


def test_what_earlier_orchestrators_named_is_not_missed_once_others_took_their_place() -> None:
    """Their keys were rotated: what was seen of their plans is forgotten, and none of them can come again."""
    node = Node(known(chat=plan(3)))
    node.hear(beacon(chat=plan(3)))
    node.known = known(beacon=None)
    node.wait(GRACE_S + TICK_S)
    assert (node.said, node.reports()) == ([], None)
    node.known = known()
    node.hear(beacon(number=2, chat=plan(1)))
    node.wait(GRACE_S)
    assert [step.named for step in node.told()] == [plan(1)]


def test_who_is_cut_off_or_asleep_blames_nobody() -> None:
    node = Node(known(chat=plan(1)))
    node.hear(beacon(chat=plan(2)))
    node.wait(10 * UNGUIDED_AFTER_S, connected=False)
    assert node.said == []
    node.now += 1000.0
    node.wait(TICK_S)
    assert node.state.silent_s == TICK_MAX_S
    assert node.said == [Look(CHAT)]


names = st.sampled_from(["chat", "embed", "tiny"])
plans = st.dictionaries(names, st.builds(plan, st.integers(1, 4), st.integers(1, 3)), max_size=3)
knowns = st.builds(lambda version, seen: known(version, **seen), st.integers(1, 3), plans)
beacons = st.builds(lambda version, seen: beacon(version, 3, **seen), st.integers(1, 3), plans)
doings = st.lists(
    st.one_of(
        beacons.map(lambda one: ("hear", one)),
        knowns.map(lambda one: ("know", one)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 1.0, 3.0, 12.0, 20.0]), st.booleans()),
    ),
    max_size=30,
)


@given(knowns, doings)
def test_in_any_history(first: Known, history: list[tuple]) -> None:  # type: ignore[type-arg]
    """Nothing is called withheld that is here, or that no beacon named, or twice in a row; and a node is unguided from
    a silence to the next beacon, never before."""
    node = Node(first)
    named: set[tuple[object, object]] = set()
    for doing in history:
        before, count = node.state, len(node.said)
        match doing:
            case "hear", Beacon() as found:
                node.hear(found)
                named |= {(None, found.roster), *found.plans.items()}
                assert not node.state.is_unguided and node.state.silent_s == 0
                assert (len(node.said) > count) == before.is_unguided
            case "know", Known() as other:
                node.known = other
            case "wait", float() as seconds, bool() as connected:
                node.wait(seconds, connected=connected)
                assert connected or node.said[count:] == []
        for step in node.said[count:]:
            if isinstance(step, Withheld):
                assert (step.thing, step.named) in named
                assert step.waited_s >= GRACE_S
                seen = node.known.roster if step.thing is None else node.known.plans.get(step.thing)
                assert seen != step.named
        assert node.state.is_unguided == (node.state.silent_s >= UNGUIDED_AFTER_S)
        newest = [step for step in node.said if isinstance(step, (Guided, Unguided))]
        assert all(isinstance(step, Unguided) == (i % 2 == 0) for i, step in enumerate(newest))
    if node.state.beacon is not None:
        for _ in range(2):  # nobody stops saying what is newest, and it is not there
            for _ in range(round(2 * GRACE_S / BEACON_EVERY_S)):
                node.hear(node.state.beacon)
                node.wait(BEACON_EVERY_S)
            said = node.reports()
            lacking = {
                name
                for name, one in node.state.beacon.plans.items()
                if name not in node.known.plans
                or (node.known.plans[name] != one and _age(node.known.plans[name]) <= _age(one))
            }
            assert (set() if said is None else set(said.withheld)) == lacking
            assert said is None or said.silent_s is None


def _age(seen: PlanSeen) -> tuple[int, int]:
    return seen.term, seen.revision


@pytest.mark.parametrize(
    ("seen", "found", "field"),
    [
        (known(beacon=BeaconSeen(term=2, number=5)), beacon(term=2, number=5), "number"),
        (known(beacon=BeaconSeen(term=2, number=5)), beacon(term=2, number=4), "number"),
        (known(beacon=BeaconSeen(term=2, number=5)), beacon(term=1, number=9), "term"),
        (known(beacon=None, chat=plan(1, term=3)), beacon(term=2), "term"),
    ],
)
def test_a_beacon_that_is_older_or_repeated_is_refused(seen: Known, found: Beacon, field: str) -> None:
    with pytest.raises(ResplitError) as refused:
        after_beacon(seen, found)
    assert (refused.value.code, refused.value.field) == (ErrorCode.ROLLED_BACK, field)


@pytest.mark.parametrize(
    ("found", "field"),
    [(beacon(term=3 + JUMP_MAX), "term"), (beacon(2 + JUMP_MAX, term=3), "roster")],
)
def test_a_beacon_that_runs_far_ahead_is_refused(found: Beacon, field: str) -> None:
    with pytest.raises(ResplitError) as refused:
        after_beacon(known(beacon=BeaconSeen(term=2, number=5)), found)
    assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_REQUEST, field)


def test_a_beacon_names_no_event_of_a_later_term_than_its_own() -> None:
    with pytest.raises(ValueError, match="'chat' of term 3 in a beacon of term 2"):
        beacon(term=2, chat=plan(1, term=3))


@pytest.mark.parametrize(
    ("count", "name", "bytes_max"),
    [(20, "deployment-{:02}", 2700), (PLANS_MAX, "d" * 58 + "-{:04}", MAX_ENVELOPE_BYTES)],
)
def test_a_beacon_is_small_and_fits_an_envelope_at_its_largest(count: int, name: str, bytes_max: int) -> None:
    term, revision = (12, 140) if count < PLANS_MAX else ((1 << 53) - 1, (1 << 53) - 1)
    plans = {name.format(i): plan(1, 1).model_copy(update={"term": term, "revision": revision}) for i in range(count)}
    said = beacon(37, term, 43_200, **plans)
    sent = seal(said, BEACON_TYPE, NodeId("orchestrator"), Ed25519PrivateKey.generate())
    assert 0.9 * bytes_max * (count < PLANS_MAX) <= len(sent) <= bytes_max


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), max_size=40))
def test_of_beacons_in_any_order_those_count_that_go_forward(order: list[tuple[int, int]]) -> None:
    now, newest = known(beacon=None), (0, 0)
    for term, number in order:
        try:
            now = after_beacon(now, beacon(term=term, number=number))
        except ResplitError:
            assert (term, number) <= newest
        else:
            assert (term, number) > newest
            newest = term, number
    assert newest == (0, 0) or now.beacon == BeaconSeen(term=newest[0], number=newest[1])

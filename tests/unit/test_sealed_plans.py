"""A sealed plan event opens for the orchestrators, in part for its nodes, and for nobody else or as anything else."""

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgpack
import pytest

from bus.enrolment import enrol, revoke, rotate
from bus.folders import ROSTER
from bus.founding import load_holder
from bus.identity import ORCHESTRATOR, Identity, load_identity
from bus.joining import join
from bus.letters import is_for
from bus.sealed_plans import seal_event
from bus.together import CLUSTER, LIFETIME, make_members
from schemas.base import DeploymentName, NodeId
from schemas.envelope import PLAN_TYPE, open_envelope, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import PlanEvent, PlanPhase
from schemas.section import SealedEvent, nothing_of, section_of
from tests.sealed_events import told, whole
from tests.unit.test_agent_policy import plan

NAMES = [NodeId(name) for name in ("n0", "n1", "n2", "n3")]
N0, N1, N2, N3 = NAMES


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_members(tmp_path / "keys", NAMES)
    return tmp_path / "keys"


def member(keys: Path, name: NodeId) -> Identity:
    return load_identity(keys / name, name)


def event(text: str = "n0:0-1 n1:2-3 n2:4-5", **changes: object) -> PlanEvent:
    made = PlanEvent(
        deployment=DeploymentName("chat"),
        term=2,
        revision=3,
        phase=PlanPhase.COMMIT,
        reason="a test",
        issued_at=datetime.now(UTC),
        current=plan(text),
    )
    return made.model_copy(update=changes)


def parts(data: bytes) -> SealedEvent:
    return SealedEvent.model_validate_json(msgpack.unpackb(data)[1])


def refused(data: bytes, reader: Identity, code: ErrorCode = ErrorCode.BAD_SIGNATURE) -> str:
    with pytest.raises(ResplitError) as caught:
        told(data, reader)
    assert caught.value.code is code
    return caught.value.message


def signed(keys: Path, sealed: SealedEvent, **changes: object) -> bytes:
    """With the orchestrator's own key, whatever it says."""
    thief = member(keys, ORCHESTRATOR)
    return seal(sealed.model_copy(update=changes), PLAN_TYPE, thief.name, thief.key)


def test_each_reader_opens_its_own_and_what_is_in_the_open_names_no_block(keys: Path) -> None:
    said = event()
    data = seal_event(said, member(keys, ORCHESTRATOR))
    assert whole(data, member(keys, ORCHESTRATOR)) == said
    for node in (N0, N1, N2):
        assert told(data, member(keys, node)) == section_of(said, node)
    assert told(data, member(keys, N3)) == nothing_of(said)
    assert told(data, member(keys, N0)).current == said.current
    assert set(type(parts(data)).model_fields) == {"deployment", "term", "revision", "issued_at", "letters"}
    assert len(parts(data).letters) == 4
    assert said.current is not None
    assert said.current.digest.encode() not in data
    with pytest.raises(ResplitError, match="is not sealed for 'n1'"):
        whole(seal_event(event("n0:0-5"), member(keys, ORCHESTRATOR)), member(keys, N1))


def test_ingresses_that_are_told_the_same_share_a_letter(keys: Path) -> None:
    said = event(answering=("n3",))
    data = seal_event(said, member(keys, ORCHESTRATOR))
    assert len(parts(data).letters) == 4
    assert told(data, member(keys, N3)) == told(data, member(keys, N0)) == section_of(said, N0)


def test_a_letter_does_not_open_in_another_event_though_its_orchestrator_signed_it(keys: Path) -> None:
    """The signature is no help where the key under it was stolen: what the letter is about is."""
    leader = member(keys, ORCHESTRATOR)
    first, later, elsewhere = (
        parts(seal_event(one, leader))
        for one in (event(), event(revision=4), event(deployment=DeploymentName("embed"), current=None))
    )
    for other in (later, elsewhere):
        for node in (N0, N1, N2):
            mixed = signed(keys, other, letters=first.letters)
            assert "was altered" in (why := refused(mixed, member(keys, node))) or "does not open" in why
    mixed = signed(keys, first, letters=later.letters[1:])
    refused(mixed, member(keys, N1))


def test_a_letter_for_one_node_is_of_no_use_to_another_or_as_another_kind(keys: Path) -> None:
    leader = member(keys, ORCHESTRATOR)
    sealed = parts(seal_event(event(), leader))
    letters = [base64.b64decode(letter) for letter in sealed.letters]
    of_n1 = next(letter for letter in letters if is_for(letter, N1))
    renamed = of_n1.replace(b"\xa2n1", b"\xa2n2", 1)
    assert renamed != of_n1
    refused(signed(keys, sealed, letters=(base64.b64encode(renamed).decode(),)), member(keys, N2))
    # An orchestrator's letter, under a node's name.
    whole_name = bytes([0xA0 + len(ORCHESTRATOR)]) + ORCHESTRATOR.encode()
    head = int.from_bytes(letters[0][:4], "little") - len(ORCHESTRATOR) + 2
    as_n2 = head.to_bytes(4, "little") + letters[0][4:].replace(whole_name, b"\xa2n2", 1)
    assert is_for(as_n2, N2)
    refused(signed(keys, sealed, letters=(base64.b64encode(as_n2).decode(),)), member(keys, N2))


def test_what_says_something_else_inside_than_outside_is_refused(keys: Path) -> None:
    leader = member(keys, ORCHESTRATOR)
    sealed = parts(seal_event(event(), leader))
    again = parts(seal_event(event("n1:0-5"), leader))
    twice = signed(keys, sealed, letters=(*sealed.letters, *again.letters))
    assert "2 letters of 'orchestrator' about '2.3' are for 'n1'" in refused(
        twice, member(keys, N1), ErrorCode.INVALID_REQUEST
    )
    for rubbish, why in (("AAAA", "not a sealed message"), ("A", "is not base64")):
        data = signed(keys, sealed, letters=(rubbish, *sealed.letters))
        assert why in refused(data, member(keys, N1), ErrorCode.INVALID_REQUEST)


def test_an_event_is_not_the_one_that_its_letter_says(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thief who writes letters as an orchestrator does, but of another event than the one that it signs."""
    leader = member(keys, ORCHESTRATOR)
    lie = section_of(event(revision=9), N1)
    monkeypatch.setattr("bus.sealed_plans.section_of", lambda *_: lie)
    data = seal_event(event(), leader)
    monkeypatch.undo()
    assert "term 2, revision 9" in refused(data, member(keys, N1), ErrorCode.INVALID_REQUEST)


def test_nobody_who_does_not_belong_is_a_reader(keys: Path) -> None:
    leader = member(keys, ORCHESTRATOR)
    root = [load_holder(keys / CLUSTER / "root-0.key")]
    revoke(keys / CLUSTER, N2, root, now=datetime.now(UTC))
    (keys / ORCHESTRATOR / ROSTER).write_bytes((keys / CLUSTER / ROSTER).read_bytes())
    without = seal_event(event(), member(keys, ORCHESTRATOR))
    assert told(without, member(keys, N2)) == nothing_of(event())
    assert told(without, member(keys, N1)) == section_of(event(), N1)
    late = load_identity(keys / ORCHESTRATOR, ORCHESTRATOR, lambda: datetime.now(UTC) + LIFETIME + timedelta(hours=1))
    assert len(parts(seal_event(event(), late)).letters) == 1, "everybody's time is over, but for who writes"
    assert leader.name == ORCHESTRATOR


async def test_with_new_keys_a_node_opens_what_is_sealed_anew_and_an_orchestrator_that_joined_all(keys: Path) -> None:
    leader, root = member(keys, ORCHESTRATOR), [load_holder(keys / CLUSTER / "root-0.key")]
    before = seal_event(event(), leader)
    join(rotate(keys / CLUSTER, N1, root, now=datetime.now(UTC)), keys / N1, datetime.now(UTC))
    second = NodeId("second")
    bundle = enrol(keys / CLUSTER, second, "orchestrator", None, LIFETIME, root, now=datetime.now(UTC))
    join(bundle, keys / second, datetime.now(UTC))
    assert "does not open" in refused(before, member(keys, N1))
    with pytest.raises(ResplitError, match="is not sealed for 'second'"):
        whole(before, member(keys, second))
    await leader.take_roster((keys / CLUSTER / ROSTER).read_bytes())
    after = seal_event(event(revision=4, phase=PlanPhase.RESEAL), leader)
    assert told(after, member(keys, N1)) == section_of(event(revision=4), N1)
    assert whole(after, member(keys, second)).revision == 4


def test_a_message_of_the_earlier_form_is_refused_for_its_type(keys: Path) -> None:
    leader = member(keys, ORCHESTRATOR)
    old = seal(event(), "application/vnd.resplit.plan.v1+json", leader.name, leader.key)
    with pytest.raises(ResplitError, match=r"plan.v2\+json' belongs"):
        open_envelope(old, SealedEvent, PLAN_TYPE, leader.orchestrators)

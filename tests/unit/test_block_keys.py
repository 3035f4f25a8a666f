"""A node is given the keys of the blocks that a plan puts on it and that the root lets it hold, and opens no others."""

import base64
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.keys import BlockKeys
from bus.hpke import block_info, unwrap
from bus.identity import ORCHESTRATOR, Identity, load_identity
from bus.together import make_members
from models.keyring import write_keys
from models.store import Store
from orchestrator.keys import KeyHolder, hosts, node_keys
from schemas.base import DeploymentName, Digest, NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import Plan, PlanEvent, PlanPhase
from schemas.roster import Roster, forbidden
from schemas.sealed import ModelKeys
from schemas.section import EventSection, nothing_of, section_of
from tests.unit.test_agent_policy import DAY, EDGE, NOW, SAFE, STRANGER, plan, roster

N0, N1 = NodeId("n0"), NodeId("n1")
CHAT = DeploymentName("chat")
MODEL = Digest("d" * 64)
KEYS = ModelKeys.of(MODEL, [bytes([i]) * 32 for i in range(6)])


def event(*, current: Plan | None = None, candidate: Plan | None = None, draining: tuple[Plan, ...] = ()) -> PlanEvent:
    return PlanEvent(
        deployment=CHAT,
        term=1,
        revision=1,
        phase=PlanPhase.PREPARE,
        reason="a test",
        issued_at=NOW,
        current=current,
        candidate=candidate,
        draining=draining,
    )


def held(event: PlanEvent, roster: Roster, now: datetime = NOW) -> dict[str, list[int]]:
    return {node: sorted(blocks) for (_, node), blocks in hosts(event, roster, now).items()}


def test_every_plan_of_an_event_gives_its_nodes_keys_to_their_own_blocks() -> None:
    earlier, now_, next_ = (
        plan(text).model_copy(update={"epoch": epoch})
        for epoch, text in enumerate(["edge:0-1 safe:2-5", "safe:0-5", "safe:0-3 edge:4-5"], 1)
    )
    found = event(current=now_, candidate=next_, draining=(earlier,))
    assert held(found, roster()) == {"edge": [0, 1, 4, 5], "safe": [0, 1, 2, 3, 4, 5]}
    assert held(event(current=now_), roster()) == {"safe": [0, 1, 2, 3, 4, 5]}
    assert held(event(), roster()) == {}


def test_nobody_is_given_what_the_root_forbids_whatever_the_plan_says() -> None:
    wrong = event(current=plan(f"{EDGE}:0-2 {SAFE}:3-4 {STRANGER}:5-5"))
    assert held(wrong, roster(every="ends")) == {"edge": [1, 2], "safe": [3, 4]}
    assert held(wrong, roster(chat="all")) == {"safe": [3, 4]}
    assert held(wrong, roster(), NOW + DAY) == {}, "their time is over"
    leader = event(current=plan("leader:0-5"))
    assert held(leader, roster()) == {}
    assert forbidden(roster().policy, roster(), CHAT, 6, NodeId("leader"), [0]) == {0}


def test_a_wrap_opens_for_its_node_alone_and_for_its_cluster_alone() -> None:
    edge = roster().member(EDGE)
    assert edge is not None
    mine = node_keys(KEYS, {4, 1}, roster().cluster, edge)
    assert (mine.node, [wrap.block for wrap in mine.wraps]) == (EDGE, [1, 4])
    own, other = (X25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (2, 1))
    info = block_info(roster().cluster, MODEL, 4, EDGE)
    assert unwrap(mine.wraps[1].data, own, info) == KEYS.key(4)
    for key, purpose in ((other, info), (own, block_info("b" * 32, MODEL, 4, EDGE))):
        with pytest.raises(ResplitError) as caught:
            unwrap(mine.wraps[1].data, key, purpose)
        assert caught.value.code is ErrorCode.BAD_SIGNATURE
    nobody_s = edge.model_copy(update={"sealing": base64.b64encode(bytes(32)).decode()})
    for blocks, member in (({6}, edge), ({1}, nobody_s)):
        with pytest.raises(ResplitError) as caught:
            node_keys(KEYS, blocks, roster().cluster, member)
        assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert b"\4" * 32 not in base64.b64decode(mine.wraps[1].wrapped)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[NodeId, Identity]:
    folder = tmp_path_factory.mktemp("members") / "keys"
    make_members(folder, [N0, N1])
    return {name: load_identity(folder / name, name) for name in (ORCHESTRATOR, N0, N1)}


def given(members: dict[NodeId, Identity], store: Store, plans: str | None) -> PlanEvent:
    holder = KeyHolder(store, members[ORCHESTRATOR], lambda: datetime.now(UTC))
    return holder.with_keys(event(current=None if plans is None else plan(plans)))


def told(event: PlanEvent, node: NodeId) -> EventSection:
    return section_of(event, node) or nothing_of(event)


def key_of(keys: BlockKeys, block: int) -> bytes | ErrorCode:
    try:
        return keys.key(MODEL, block)
    except ResplitError as error:
        return error.code


def test_an_agent_opens_its_own_blocks_until_the_plan_that_gave_them_is_gone(
    members: dict[NodeId, Identity], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    write_keys(store, KEYS)
    n0, n1 = BlockKeys(members[N0]), BlockKeys(members[N1])
    first = given(members, store, "n0:0-3 n1:4-5")
    n0.follow(told(first, N0))
    n1.follow(told(first, N1))
    missing = ErrorCode.MISSING_KEYS
    assert [key_of(n0, block) for block in range(6)] == [*map(KEYS.key, range(4)), missing, missing]
    assert [key_of(n1, block) for block in range(6)] == [*[missing] * 4, *map(KEYS.key, (4, 5))]
    n0.follow(told(given(members, store, "n0:0-2 n1:3-5"), N0))
    assert key_of(n0, 3) is missing
    n0.follow(told(given(members, store, None), N0))
    assert key_of(n0, 0) is missing


def test_keys_wrapped_for_another_node_are_of_no_use_under_one_s_own_name(
    members: dict[NodeId, Identity], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    write_keys(store, KEYS)
    found = given(members, store, "n0:0-3 n1:4-5")
    renamed = tuple(keys.model_copy(update={"node": N0}) for keys in found.keys or () if keys.node == N1)
    assert renamed
    thief = BlockKeys(members[N0])
    thief.follow(told(found.model_copy(update={"keys": renamed}), N0))
    assert key_of(thief, 4) is ErrorCode.BAD_SIGNATURE


def test_a_plan_of_a_model_in_the_open_and_one_whose_keys_are_damaged_come_without_keys(
    members: dict[NodeId, Identity], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    assert given(members, store, "n0:0-5").keys is None
    write_keys(store, KEYS)
    (store.keys_folder / MODEL).write_bytes(b"rubbish")
    assert given(members, store, "n0:0-5").keys is None
    write_keys(store, ModelKeys.of(MODEL, [KEYS.key(0)]))
    found = given(members, store, "n0:0-0 n1:1-5").keys
    assert found is not None
    assert [keys.node for keys in found] == [N0], "n1 lacks keys, and n0 has its own all the same"


def test_a_member_whose_folder_has_no_sealing_key_does_not_start(tmp_path: Path) -> None:
    make_members(tmp_path / "keys", [N0])
    file = tmp_path / "keys" / N0 / "n0.sealing.key"
    file.write_bytes((tmp_path / "keys" / N0 / "n0.key").read_bytes())
    for said in ("is not an X25519 key", "cannot read"):
        with pytest.raises(ResplitError, match=said):
            BlockKeys(load_identity(tmp_path / "keys" / N0, N0))
        file.unlink(missing_ok=True)

"""Who reads what of a heartbeat: orchestrators all of it, an ingress what runs for it, all others that its node is."""

import base64
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bus.identity import ORCHESTRATOR, Identity, load_identity
from bus.letters import MAX_READERS
from bus.sealed_heartbeats import open_heartbeat, read_capacity, read_hosting, seal_heartbeat
from bus.together import make_members
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import BlockTime, Capacity, HostedStage, LostPeer
from schemas.codec import encode
from schemas.envelope import HEARTBEAT_TYPE, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.heartbeat import Heartbeat, Hosting, hosting_of, hostings_of, presence_of
from tests.trigger_world import World

CHAT, VISION = DeploymentName("chat"), DeploymentName("vision")
LLAMA, CNN = Digest("1" * 64), Digest("2" * 64)
HOST, N1, N2, SPARE = (NodeId(name) for name in ("host", "n1", "n2", "spare"))


def stage(deployment: DeploymentName, model: Digest, *blocks: int) -> HostedStage:
    return HostedStage(deployment=deployment, epoch=3, model=model, blocks=blocks, state="serving", sequences=1)


def times(model: Digest, *blocks: int) -> tuple[BlockTime, ...]:
    return tuple(BlockTime(model=model, block=block, decode_ms=1.0, prefill_ms_per_token=0.1) for block in blocks)


CAPACITY: Capacity = (
    World(3, 0)
    .heartbeat(NodeId("n0"))
    .model_copy(
        update={
            "node": HOST,
            "boot": "first",
            "sequence": 7,
            "link": "127.0.0.1:7",
            "issued_at": datetime.now(UTC),
            "stages": (stage(CHAT, LLAMA, 4, 5), stage(VISION, CNN, 0)),
            "block_times": (*times(LLAMA, 4, 5), *times(CNN, 0), *times(Digest("3" * 64), 0)),
            "lost_peers": (LostPeer(node=SPARE, boot="old"),),
            "contention": 1.5,
        }
    )
)


def ingresses(deployment: DeploymentName) -> tuple[NodeId, ...]:
    return {CHAT: (N1,), VISION: (N1, N2, HOST)}.get(deployment, (SPARE,))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_members(folder, [HOST, N1, N2, SPARE], edge=[SPARE])
    return folder


def member(keys: Path, name: NodeId) -> Identity:
    return load_identity(keys / name, name)


def heard(keys: Path, reader: NodeId, data: bytes) -> Heartbeat:
    return open_heartbeat(data, member(keys, reader))


def test_each_reads_its_part_and_no_more(keys: Path) -> None:
    data = seal_heartbeat(CAPACITY, ingresses, member(keys, HOST))
    told = {name: read_hosting(heard(keys, name, data), member(keys, name)) for name in (N1, N2, SPARE)}
    assert told == {
        N1: Hosting(stages=CAPACITY.stages, block_times=CAPACITY.block_times[:3], contention=1.5),
        N2: Hosting(stages=CAPACITY.stages[1:], block_times=CAPACITY.block_times[2:3], contention=1.5),
        SPARE: None,
    }
    leader = member(keys, ORCHESTRATOR)
    assert read_capacity(heard(keys, ORCHESTRATOR, data), leader) == CAPACITY
    assert read_capacity(heard(keys, SPARE, data), member(keys, SPARE)) is None
    with pytest.raises(ResplitError, match="made for another reader or purpose"):
        read_capacity(heard(keys, N1, data), member(keys, N1))
    for name in (N1, N2, SPARE):
        assert presence_of(heard(keys, name, data)) == presence_of(CAPACITY)


def test_in_the_open_is_that_the_node_is_there_and_nothing_of_what_it_runs(keys: Path) -> None:
    data = seal_heartbeat(CAPACITY, ingresses, member(keys, HOST))
    found = heard(keys, SPARE, data)
    assert type(found).model_fields.keys() == {
        *("node", "boot", "sequence", "issued_at", "link", "lost_peers", "letters"),
    }
    around = data
    for letter in found.letters:
        around = around.replace(letter.encode(), b"")
        assert not any(secret.encode() in base64.b64decode(letter) for secret in (LLAMA, CNN, "stages", "block_times"))
    assert not any(secret.encode() in around for secret in (CHAT, VISION, LLAMA, CNN, "block", "memory"))


def test_a_node_that_runs_nothing_tells_orchestrators_alone(keys: Path) -> None:
    idle = CAPACITY.model_copy(update={"stages": ()})
    data = seal_heartbeat(idle, ingresses, member(keys, HOST))
    assert len(heard(keys, N1, data).letters) == 1
    assert read_capacity(heard(keys, ORCHESTRATOR, data), member(keys, ORCHESTRATOR)) == idle


def test_who_is_no_member_or_is_too_many_for_one_letter_gets_none_or_another(keys: Path, tmp_path: Path) -> None:
    data = seal_heartbeat(CAPACITY, lambda of: (NodeId("nobody"), N1) if of == CHAT else (), member(keys, HOST))
    assert read_hosting(heard(keys, N1, data), member(keys, N1)) == hosting_of(CAPACITY, {CHAT})
    names = [NodeId(f"m{i}") for i in range(MAX_READERS + 1)]
    make_members(tmp_path, [HOST, *names])
    data = seal_heartbeat(CAPACITY, lambda of: names if of == CHAT else (), member(tmp_path, HOST))
    assert len(heard(tmp_path, HOST, data).letters) == 3
    assert read_hosting(heard(tmp_path, names[-1], data), member(tmp_path, names[-1])) is not None


def test_letters_of_another_heartbeat_do_not_open(keys: Path) -> None:
    host = member(keys, HOST)
    later = CAPACITY.model_copy(update={"sequence": 8})
    old, new = (heard(keys, N1, seal_heartbeat(one, ingresses, host)) for one in (CAPACITY, later))
    mixed = new.model_copy(update={"letters": old.letters})
    read = open_heartbeat(seal(mixed, HEARTBEAT_TYPE, HOST, host.key), member(keys, N1))
    for reader, take in ((N1, read_hosting), (ORCHESTRATOR, read_capacity)):
        with pytest.raises(ResplitError) as caught:
            take(read, member(keys, reader))
        assert caught.value.code is ErrorCode.BAD_SIGNATURE


def test_nobody_speaks_for_another_node(keys: Path) -> None:
    with pytest.raises(ResplitError, match="'n2' speaks for another node") as caught:
        heard(keys, N1, seal_heartbeat(CAPACITY, ingresses, member(keys, N2)))
    assert caught.value.code is ErrorCode.BAD_SIGNATURE


def test_ingresses_that_are_told_the_same_share_a_letter() -> None:
    parts = hostings_of(CAPACITY, {CHAT: (N1, N2), VISION: (SPARE, HOST)}.__getitem__)
    assert [(len(part.stages), names) for part, names in parts] == [(1, frozenset({N1, N2})), (1, frozenset({SPARE}))]
    assert hostings_of(CAPACITY, lambda _: ()) == ()
    assert encode(parts[0][0]) != encode(parts[1][0])

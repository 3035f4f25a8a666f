"""One secret, drawn by the client, seals all that follows from a request, and opens for its readers and nobody else."""

import hashlib
import hmac
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from agent.intake import opened, read
from agent.replies import Replier
from bus.identity import load_identity, read_roster
from bus.letters import About, seal_letter
from bus.sealed_requests import SENDER, Asked, Seal, open_request, seal_request
from bus.together import CLUSTER, OPERATOR, add_member, make_members
from resplit.replies import RequestError
from resplit.sealing import Sealer
from schemas.base import DeploymentName, NodeId, RequestId
from schemas.codec import CONTENT_TYPE, JSON, MSGPACK, REQUEST_ID, SEALED
from schemas.errors import ErrorCode, ResplitError
from schemas.journal import AcceptedRequest, LiveRequest, Run
from schemas.request import AcceptedReply
from schemas.roster import readers_at

CHAT, R1 = DeploymentName("chat"), RequestId("r1")
A, B = NodeId("a"), NodeId("b")
KEYS = {name: X25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i, name in enumerate((A, B), 1)}
READERS = {name: key.public_key() for name, key in KEYS.items()}
REQUEST = b'{"request_id":"r1","prompt":"the weather in Delphi"}'
LETTER, CLIENTS = seal_request(REQUEST, JSON, CHAT, R1, READERS)
SEAL = Seal(bytes(32), CHAT, R1)
tokens = st.integers(0, (1 << 32) - 1)
reals = st.floats(allow_nan=False)
likelies = st.tuples(st.none() | reals, st.lists(st.tuples(tokens, reals), max_size=3).map(tuple))


def code(error: pytest.ExceptionInfo[ResplitError]) -> tuple[ErrorCode, str | None]:
    return error.value.code, error.value.field


def test_every_reader_reads_the_request_and_answers_what_the_client_reads() -> None:
    for name, key in KEYS.items():
        asked = open_request(LETTER, CHAT, R1, name, key)
        assert (asked.data, asked.content_type) == (REQUEST, JSON)
        assert asked.seal is not None
        assert CLIENTS.open_reply(asked.seal.seal_reply(b"sunny")) == b"sunny"


def test_one_reader_goes_on_where_another_stopped() -> None:
    first, second = (open_request(LETTER, CHAT, R1, name, KEYS[name]).seal for name in (A, B))
    assert first is not None
    assert second is not None
    live = LiveRequest(1, AcceptedRequest(R1, "m", LETTER, SEALED, "inbox"), 0.0)
    runs = (Run(1, 0, (7, 8)), Run(1, 1, (8, 9)), Run(1, 5, (1,)))
    assert second.open_tokens(replace(live, sealed=tuple(map(first.seal_run, runs)))).tokens == (7, 8, 9)


def test_a_request_opens_as_no_other() -> None:
    for deployment, request in ((DeploymentName("embed"), R1), (CHAT, RequestId("r2"))):
        with pytest.raises(ResplitError) as caught:
            open_request(LETTER, deployment, request, A, KEYS[A])
        assert caught.value.code is ErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb([bytes(31), JSON, b"{}"]),
        msgpack.packb(["0" * 32, JSON, b"{}"]),
        msgpack.packb([bytes(32), b"json", b"{}"]),
        msgpack.packb([bytes(32), JSON, "{}"]),
        msgpack.packb([bytes(32), JSON, b"{}", b""]),
        msgpack.packb([bytes(32), "x" * 300, b"{}"]),
        msgpack.packb([[[[]]]] * 3),
        msgpack.packb({"secret": bytes(32)}),
    ],
)
def test_a_letter_that_holds_no_request_is_refused_as_such(payload: bytes) -> None:
    letter = seal_letter(payload, READERS, About("request", CHAT, R1, SENDER))
    with pytest.raises(ResplitError, match="holds no request"):
        open_request(letter, CHAT, R1, A, KEYS[A])


def test_replies_and_tokens_of_one_request_open_as_those_of_no_other_and_not_as_each_other() -> None:
    reply, run = SEAL.seal_reply(b"sunny"), SEAL.seal_run(Run(1, 0, (7,)))
    for other in (
        Seal(b"\1" * 32, CHAT, R1),
        Seal(bytes(32), DeploymentName("embed"), R1),
        Seal(bytes(32), CHAT, RequestId("r2")),
    ):
        for refused in (partial(other.open_reply, reply), partial(other.open_run, run)):
            with pytest.raises(ResplitError) as caught:
                refused()
            assert caught.value.code is ErrorCode.BAD_SIGNATURE
    for data in (run.box, b"", reply[:12], reply[:-1], reply + b"\0", bytes([reply[0] ^ 1]) + reply[1:]):
        with pytest.raises(ResplitError) as caught:
            SEAL.open_reply(data)
        assert caught.value.code is ErrorCode.BAD_SIGNATURE


@given(st.integers(0, 1 << 40), st.lists(st.tuples(tokens, likelies), max_size=5), st.booleans())
def test_tokens_come_back_with_their_log_probabilities(first: int, said: list, scored: bool) -> None:  # type: ignore[type-arg]
    run = Run(3, first, tuple(token for token, _ in said), tuple(likely for _, likely in said) if scored else ())
    assert SEAL.open_run(SEAL.seal_run(run)) == run


def test_how_long_sealed_tokens_are_says_how_many_and_nothing_else() -> None:
    sizes = {len(SEAL.seal_run(Run(1, 0, ids)).box) for ids in ((0, 0), (1, 70_000), (1 << 31, (1 << 32) - 1))}
    assert sizes == {12 + 8 + 16}


def test_tokens_that_were_moved_or_altered_are_passed_over() -> None:
    live = LiveRequest(1, AcceptedRequest(R1, "m", LETTER, SEALED, "inbox"), 0.0)
    good, late = SEAL.seal_run(Run(1, 0, (7,))), SEAL.seal_run(Run(1, 1, (8,)))
    for wrong in (replace(late, first=0), replace(late, count=2), replace(late, box=b""), replace(late, box=good.box)):
        assert SEAL.open_tokens(replace(live, sealed=(wrong, good))).tokens == (7,)


def test_the_same_reply_is_never_the_same_bytes_and_its_length_one_of_few() -> None:
    assert SEAL.seal_reply(b"a") != SEAL.seal_reply(b"a")
    assert {len(SEAL.seal_reply(bytes(size))) for size in range(200)} == {12 + 256 + 16}


def test_the_keys_of_replies_are_derived_as_the_protocol_says() -> None:
    """Written out once more, as another client would."""
    extracted = hmac.new(bytes(32), bytes(32), hashlib.sha256).digest()
    key = hmac.new(extracted, b"resplit.sealed-request.v1|reply|chat|r1\1", hashlib.sha256).digest()
    data = SEAL.seal_reply(b"sunny")
    plain = AESGCM(key).decrypt(data[:12], data[12:], None)
    assert plain == (b"\5\0\0\0sunny").ljust(256, b"\0")


# At the ingress.


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("members")
    make_members(folder, [A, B], edge=[B])
    return folder


def test_a_trusted_agent_opens_what_a_client_sealed_by_the_roster_and_no_other_agent_does(members: Path) -> None:
    sealed = Sealer(members / OPERATOR).seal(CHAT, R1, REQUEST, MSGPACK)
    assert sealed.headers == {CONTENT_TYPE: SEALED, REQUEST_ID: R1}
    identity = load_identity(members / A, A)
    asked = opened(sealed.data, SEALED, CHAT, R1, identity)
    assert (asked.data, asked.content_type) == (REQUEST, MSGPACK)
    with pytest.raises(ResplitError) as caught:
        opened(sealed.data, SEALED, CHAT, R1, load_identity(members / B, B))
    assert code(caught) == (ErrorCode.BAD_SIGNATURE, None)
    with pytest.raises(ResplitError) as caught:
        opened(sealed.data, SEALED, CHAT, None, identity)
    assert code(caught) == (ErrorCode.INVALID_REQUEST, REQUEST_ID)


def test_what_came_in_the_open_is_as_it_came(members: Path) -> None:
    assert opened(REQUEST, JSON, CHAT, None, load_identity(members / A, A)) == Asked(REQUEST, JSON)


@pytest.mark.parametrize("data", [b'{"prompt":"a"}', b'{"request_id":"r2","prompt":"a"}'])
def test_a_sealed_request_says_the_id_that_it_was_sealed_under(data: bytes) -> None:
    assert read(Asked(data.replace(b"r2", b"r1"), JSON), None)
    with pytest.raises(ResplitError) as caught:
        read(Asked(data, JSON, SEAL), R1)
    assert code(caught) == (ErrorCode.INVALID_REQUEST, "request_id")


async def test_a_reply_too_large_for_the_server_becomes_a_sealed_error() -> None:
    class Small:
        max_payload = 1000
        said: bytes = b""
        headers: dict[str, str] | None = None

        def new_inbox(self) -> str:
            return "bounces"

        async def publish(self, _: str, data: bytes, reply: str, headers: dict[str, str]) -> None:
            self.said, self.headers = data, headers

    bus = Small()
    replier = Replier(bus, lambda _: None)  # type: ignore[arg-type]
    reply = replier.at("inbox", SEALED).to_asker_of(Asked(REQUEST, MSGPACK, SEAL))
    await reply.send(AcceptedReply(request_id=R1, deployment="x" * 2000, epoch=1), None)
    assert bus.headers == {CONTENT_TYPE: SEALED}
    assert msgpack.unpackb(SEAL.open_reply(bus.said))["error"]["code"] == "payload_too_large"


# At the client.


def test_only_trusted_agents_whose_time_it_is_are_readers(members: Path) -> None:
    roster = read_roster(members / CLUSTER)
    assert set(readers_at(roster, datetime.now(UTC))) == {A}
    assert readers_at(roster, datetime.now(UTC) - timedelta(days=1)) == {}


def test_a_program_that_runs_on_seals_by_the_newer_roster_in_its_folder(tmp_path: Path) -> None:
    make_members(tmp_path, [A])
    sealer = Sealer(tmp_path / OPERATOR)
    add_member(tmp_path, B, "agent", "trusted")
    asked = opened(sealer.seal(CHAT, R1, REQUEST, JSON).data, SEALED, CHAT, R1, load_identity(tmp_path / B, B))
    assert asked.data == REQUEST


def test_a_folder_without_a_roster_or_a_roster_without_readers_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        Sealer(tmp_path)
    assert (caught.value.code, caught.value.field) == ("invalid_request", "keys")
    make_members(tmp_path / "none", [B], edge=[B])
    with pytest.raises(RequestError, match="names 0 trusted agents") as caught:
        Sealer(tmp_path / "none" / OPERATOR).seal(CHAT, R1, REQUEST, JSON)
    assert (caught.value.code, caught.value.field, caught.value.request_id) == ("invalid_request", "readers", R1)
    make_members(tmp_path / "forged", [A])
    roster = tmp_path / "forged" / OPERATOR / "roster.signed"
    sealer = Sealer(roster.parent)
    make_members(tmp_path / "other", [A])
    roster.write_bytes((tmp_path / "other" / OPERATOR / "roster.signed").read_bytes())
    with pytest.raises(RequestError) as caught:
        sealer.seal(CHAT, R1, REQUEST, JSON)
    assert caught.value.code == "bad_signature"
    for name in ("no|name", "no\r\nname", "name\n", ""):
        with pytest.raises(RequestError) as caught:
            Sealer(tmp_path / "other" / OPERATOR).seal(CHAT, name, REQUEST, JSON)
        assert (caught.value.code, caught.value.field) == ("invalid_request", "request_id")

"""The client against a real nats-server and a peer that speaks the wire protocol, well and badly."""

import ast
import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgpack
import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

import resplit
from bus.connection import connect, settle
from bus.identity import load_credentials
from bus.natsconf import LOGINS_FILE
from bus.server_certificate import server_files
from bus.together import CLIENT, CLUSTER
from resplit import Client, RequestError, StageTiming, Tensor, Token, Usage, exchange
from resplit.server import NatsServer

Handler = Callable[[Nats, Msg, dict[str, Any]], Awaitable[None]]

USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 4,
    "total_tokens": 7,
    "queued_ms": 0.5,
    "ttft_ms": 4.0,
    "tpot_ms": 1.5,
    "total_ms": 8.5,
    "network_ms": 1.0,
    "epoch": 2,
    "route": 0,
    "stages": [{"node": "n0", "first": 0, "last": 9, "compute_ms": 6.0, "queue_ms": 1.0, "calls": 4}],
}
READ_USAGE = Usage(
    prompt_tokens=3,
    completion_tokens=4,
    total_tokens=7,
    cached_tokens=0,
    queued_ms=0.5,
    total_ms=8.5,
    network_ms=1.0,
    epoch=2,
    route=0,
    stages=(StageTiming("n0", 0, 9, 6.0, 1.0, 4),),
    ttft_ms=4.0,
    tpot_ms=1.5,
)
IDS = [11, 12, 13, 14]


@pytest.fixture
def keys(members: Path) -> Path:
    """The folder of a client."""
    return members / CLIENT


@pytest.fixture
async def server_url(tmp_path: Path, members: Path) -> AsyncIterator[str]:
    server = NatsServer(tmp_path / "nats", (members / CLUSTER / LOGINS_FILE).read_text, server_files(members / CLUSTER))
    await server.start()
    yield server.url
    await server.child.stop()


@pytest.fixture
async def peer(server_url: str, members: Path) -> AsyncIterator[Nats]:
    connection = await connect(server_url, "n0", credentials=load_credentials(members / "n0"))
    yield connection
    await connection.close()


async def serve(peer: Nats, handler: Handler, deployment: str = "adder") -> asyncio.Queue[str]:
    """Answer requests with `handler`; the queue yields the ids that clients cancel."""
    cancelled: asyncio.Queue[str] = asyncio.Queue()

    async def answer(message: Msg) -> None:
        content_type = (message.headers or {}).get("Content-Type", "")
        body = msgpack.unpackb(message.data) if "msgpack" in content_type else json.loads(message.data)
        await handler(peer, message, body)

    async def cancel(message: Msg) -> None:
        cancelled.put_nowait(message.subject.rsplit(".", 1)[-1])

    await peer.subscribe(f"resplit.v1.infer.{deployment}", "ingress", cb=answer)
    await peer.subscribe("resplit.v1.cancel.*", cb=cancel)
    await settle(peer)
    return cancelled


def token(request_id: str, index: int, **more: Any) -> dict[str, Any]:
    last = {"finish_reason": "stop", "usage": USAGE} if index == len(IDS) - 1 else {}
    return {"request_id": request_id, "index": index, "token_id": IDS[index], "text": chr(97 + index), **last, **more}


def replying(order: list[int]) -> Handler:
    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        accepted = {"request_id": body["request_id"], "status": "accepted", "deployment": "adder", "epoch": 2}
        for reply in (accepted, *(token(body["request_id"], index) for index in order)):
            await peer.publish(message.reply, json.dumps(reply).encode())

    return handler


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 0, 1, 0, 1, 2, 2, 3, 3], [2, 0, 3, 1], [3, 3, 2, 1, 1, 0]])
async def test_each_token_is_delivered_once_and_in_order_whatever_the_wire_does(
    server_url: str, keys: Path, peer: Nats, order: list[int]
) -> None:
    cancelled = await serve(peer, replying(order))
    async with Client(server_url, keys=keys) as client:
        found = [t async for t in client.stream("adder", "1+2=", request_id="r1")]
    last = Token("r1", 3, 14, "d", finish_reason="stop", usage=READ_USAGE)
    assert found == [Token("r1", 0, 11, "a"), Token("r1", 1, 12, "b"), Token("r1", 2, 13, "c"), last]
    await peer.flush()
    assert cancelled.empty(), "a finished request is not cancelled"


async def test_a_completion_is_the_stream_gathered(server_url: str, keys: Path, peer: Nats) -> None:
    await serve(peer, replying([1, 0, 2, 2, 3]))
    async with Client(server_url, keys=keys) as client:
        answers = await asyncio.gather(*(client.complete("adder", "1+2=") for _ in range(20)))
    assert {(a.token_ids, a.text, a.finish_reason, a.usage) for a in answers} == {
        ((11, 12, 13, 14), "abcd", "stop", READ_USAGE)
    }
    assert len({a.request_id for a in answers}) == 20


async def test_the_request_is_what_the_protocol_says(server_url: str, keys: Path, peer: Nats) -> None:
    seen: list[dict[str, Any]] = []

    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        seen.append(body)
        await replying([0, 1, 2, 3])(peer, message, body)

    await serve(peer, handler)
    messages = [{"role": "user", "content": "1+2"}]
    async with Client(server_url, keys=keys) as client:
        await client.complete("adder", messages=messages, seed=None, max_tokens=9, request_id="mine")
    assert seen == [{"request_id": "mine", "max_tokens": 9, "messages": messages, "stream": True}]


async def test_logprobs_reach_the_application(server_url: str, keys: Path, peer: Nats) -> None:
    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        top = [{"token_id": 5, "logprob": -0.5}]
        for index in range(4):
            reply = token(body["request_id"], index, logprob=-float(index), top_logprobs=top)
            await peer.publish(message.reply, json.dumps(reply).encode())

    await serve(peer, handler)
    async with Client(server_url, keys=keys) as client:
        answer = await client.complete("adder", "1+2=", logprobs=1)
    assert answer.logprobs == (0.0, -1.0, -2.0, -3.0)
    assert answer.top_logprobs == ((resplit.TokenLogprob(5, -0.5),),) * 4


async def test_nobody_serving_is_told_at_once(server_url: str, keys: Path) -> None:
    async with Client(server_url, keys=keys) as client:
        for name in ("absent", "not a name"):
            with pytest.raises(RequestError) as caught:
                await client.complete(name, "1+2=", request_id="r1")
            assert (caught.value.code, caught.value.request_id) == ("unknown_deployment", "r1")


async def test_a_folder_that_is_no_member_s_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not the folder of one member") as caught:
        Client(keys=tmp_path)
    assert (caught.value.code, caught.value.field) == ("invalid_request", "keys")


async def test_silence_is_a_timeout_and_cancels(server_url: str, keys: Path, peer: Nats) -> None:
    cancelled = await serve(peer, replying([0, 2, 3]))  # token 1 never comes
    found = []
    async with Client(server_url, keys=keys, idle_timeout_s=0.2) as client:
        with pytest.raises(RequestError) as caught:
            async for t in client.stream("adder", "1+2=", request_id="r2"):
                found.append(t.index)
    assert (caught.value.code, found) == ("timeout", [0])
    assert await asyncio.wait_for(cancelled.get(), 5) == "r2"


async def test_what_nobody_accepts_is_asked_again_and_answered_once(
    server_url: str, keys: Path, peer: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ASK_AGAIN_S", (0.1,))
    seen: list[dict[str, Any]] = []

    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        seen.append(body)
        if len(seen) == 1:
            return  # it hangs
        twice = {"code": "invalid_request", "message": "in flight already", "field": "request_id"}
        refusal = {"request_id": body["request_id"], "error": twice}
        await peer.publish(message.reply, json.dumps(refusal).encode())
        await replying([0, 1, 2, 3])(peer, message, body)

    await serve(peer, handler)
    async with Client(server_url, keys=keys) as client:
        answer = await client.complete("adder", "1+2=", temperature=1.0)
    assert answer.token_ids == tuple(IDS)
    assert len(seen) == 2
    assert seen[0] == seen[1], "under its id, and with its seed"
    assert "seed" in seen[0]


async def test_who_has_it_may_come_back_later_than_the_client(server_url: str, keys: Path, peer: Nats) -> None:
    """As after the server was away: the client asks for what it missed, and nobody is there yet."""
    times = 0

    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        nonlocal times
        times += 1
        await replying([0, 1] if times == 1 else [0, 1, 2, 3])(peer, message, body)

    await serve(peer, handler)
    async with Client(server_url, keys=keys) as client, aclosing(client.stream("adder", "1+2=")) as stream:
        found = [await anext(stream), await anext(stream)]
        [listening] = [one for one in peer._subs.values() if one.queue == "ingress"]
        await listening.unsubscribe()
        await settle(peer)
        assert client._nats is not None
        await client._nats.force_reconnect()
        rest = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(2.0)  # it is back, and has asked again
        assert not rest.done(), "nobody answered, and that is not the end"
        await serve(peer, handler)
        found += [await rest, await anext(stream)]
    assert [one.token_id for one in found] == IDS
    assert times == 2


@pytest.mark.parametrize("refused", [True, False])
async def test_what_one_has_accepted_no_other_can_refuse(
    server_url: str, keys: Path, peer: Nats, monkeypatch: pytest.MonkeyPatch, *, refused: bool
) -> None:
    monkeypatch.setattr(exchange, "ASK_AGAIN_S", (0.1,))
    asked: list[Msg] = []

    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        asked.append(message)
        if len(asked) == 1:
            return  # it hangs
        await replying([0, 1])(peer, message, body)
        error = {"code": "node_lost", "message": "another ingress took over", "field": None}
        late = {"request_id": body["request_id"], "error": error, **({"refused": True} if refused else {})}
        await peer.publish(asked[0].reply, json.dumps(late).encode())
        for index in (2, 3):
            await peer.publish(message.reply, json.dumps(token(body["request_id"], index)).encode())

    await serve(peer, handler)
    async with Client(server_url, keys=keys) as client:
        if refused:
            assert (await client.complete("adder", "1+2=")).token_ids == tuple(IDS)
        else:
            with pytest.raises(RequestError, match="another ingress took over"):
                await client.complete("adder", "1+2=")


async def test_an_id_in_flight_is_an_error_where_it_was_asked_once(server_url: str, keys: Path, peer: Nats) -> None:
    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        error = {"code": "invalid_request", "message": "in flight already", "field": "request_id"}
        await peer.publish(message.reply, json.dumps({"request_id": body["request_id"], "error": error}).encode())

    await serve(peer, handler)
    async with Client(server_url, keys=keys) as client:
        with pytest.raises(RequestError, match="in flight already"):
            await client.complete("adder", "1+2=")


async def test_leaving_early_cancels(server_url: str, keys: Path, peer: Nats) -> None:
    cancelled = await serve(peer, replying([0, 1]))
    async with Client(server_url, keys=keys) as client:
        async with aclosing(client.stream("adder", "1+2=", request_id="r3")) as tokens:
            async for _ in tokens:
                break
        assert await asyncio.wait_for(cancelled.get(), 5) == "r3"
        async for _ in client.stream("adder", "1+2=", request_id="r4"):
            break
        assert await asyncio.wait_for(cancelled.get(), 5) == "r4"
        waiting = asyncio.create_task(client.complete("adder", "1+2=", request_id="r5"))
        await asyncio.sleep(0.1)
        waiting.cancel()
        assert await asyncio.wait_for(cancelled.get(), 5) == "r5"
        await client.cancel("r6")
        assert await asyncio.wait_for(cancelled.get(), 5) == "r6"


async def test_an_error_reply_is_raised_with_its_facts(server_url: str, keys: Path, peer: Nats) -> None:
    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        error = {"code": "token_out_of_range", "message": "token 99 of 24", "field": "token_ids.0"}
        await peer.publish(message.reply, json.dumps({"request_id": body["request_id"], "error": error}).encode())

    cancelled = await serve(peer, handler)
    async with Client(server_url, keys=keys) as client:
        with pytest.raises(RequestError) as caught:
            await client.complete("adder", token_ids=[99], request_id="r7")
    error = caught.value
    facts = (error.code, error.message, error.field, error.request_id)
    assert facts == ("token_out_of_range", "token 99 of 24", "token_ids.0", "r7")
    assert cancelled.empty()


async def test_a_token_that_comes_twice_with_different_ids_is_an_error(server_url: str, keys: Path, peer: Nats) -> None:
    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        for reply in (token(body["request_id"], 0), token(body["request_id"], 0, token_id=99)):
            await peer.publish(message.reply, json.dumps(reply).encode())

    await serve(peer, handler)
    async with Client(server_url, keys=keys) as client:
        with pytest.raises(RequestError, match="token 0 came as 11 and as 99"):
            await client.complete("adder", "1+2=")


@pytest.mark.parametrize("reply", [b"", b"{", b"[]", b'{"index": 0}', b'{"error": 5}', b'{"error": {"code": "x"}}'])
async def test_a_reply_that_makes_no_sense_is_an_error_not_a_crash(
    server_url: str, keys: Path, peer: Nats, reply: bytes
) -> None:
    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        await peer.publish(message.reply, reply)

    await serve(peer, handler)
    async with Client(server_url, keys=keys) as client:
        with pytest.raises(RequestError) as caught:
            await client.complete("adder", "1+2=")
    assert caught.value.code == "internal"


class Reversed:
    """Stands for a seal: what is sealed is the same bytes backwards."""

    def __init__(self, data: bytes, request_id: str, roster: int) -> None:
        self.data, self.headers = data[::-1], {"Content-Type": "sealed", "Resplit-Request": request_id}
        self.roster = roster

    def open(self, data: bytes, content_type: str) -> bytes | None:
        return data[::-1] if content_type == "sealed" else None


class Reverser:
    """Seals by roster 1 until it asks anew, and then by `newest`."""

    def __init__(self, newest: int = 1) -> None:
        self.newest = newest
        self.roster = 1
        self.followed: set[Nats] = set()

    async def follow(self, connection: Nats) -> None:
        self.followed.add(connection)

    async def renew(self, connection: Nats) -> None:
        assert self.followed == {connection}
        self.roster = self.newest

    def seal(self, deployment: str, request_id: str, data: bytes, content_type: str) -> Reversed:
        assert (deployment, content_type) == ("adder", "application/json")
        return Reversed(data, request_id, self.roster)


async def sealed_peer(peer: Nats, strange: list[tuple[bytes, dict[str, str]]]) -> None:
    """Answers a sealed request, after each of these messages from strangers."""

    async def answer(message: Msg) -> None:
        body = json.loads(message.data[::-1])
        assert message.headers == {"Content-Type": "sealed", "Resplit-Request": body["request_id"]}
        for index in range(len(IDS)):
            for data, headers in strange:
                await peer.publish(message.reply, data, headers=headers)
            reply = json.dumps(token(body["request_id"], index)).encode()
            await peer.publish(message.reply, reply[::-1], headers={"Content-Type": "sealed"})

    await peer.subscribe("resplit.v1.infer.adder", "ingress", cb=answer)
    await settle(peer)


async def test_what_a_stranger_says_to_a_sealed_request_is_passed_over(server_url: str, keys: Path, peer: Nats) -> None:
    forged = json.dumps(token("r1", 0, token_id=99, text="forged")).encode()
    await sealed_peer(
        peer, [(forged, {}), (b"[]", {}), (b"\xff", {}), (b"\xc1", {"Content-Type": "application/msgpack"})]
    )
    async with Client(server_url, keys=keys, sealer=Reverser()) as client:
        answer = await client.complete("adder", "1+2=", request_id="r1")
    assert (answer.token_ids, answer.text) == (tuple(IDS), "abcd")


async def test_who_cannot_read_a_sealed_request_says_so_in_the_open(server_url: str, keys: Path, peer: Nats) -> None:
    error = {"code": "bad_signature", "message": "the letter is not for n2"}
    await sealed_peer(peer, [(json.dumps({"request_id": "r1", "error": error}).encode(), {})])
    async with Client(server_url, keys=keys, sealer=Reverser()) as client:
        with pytest.raises(RequestError, match="not for n2") as caught:
            await client.complete("adder", "1+2=", request_id="r1")
    assert caught.value.code == "bad_signature"


@pytest.mark.parametrize("refusals", [1, 2])
async def test_a_letter_that_is_not_for_its_reader_is_sealed_anew_once_if_there_is_a_newer_roster(
    server_url: str, keys: Path, peer: Nats, refusals: int
) -> None:
    asked: list[bytes] = []

    async def answer(message: Msg) -> None:
        asked.append(message.data)
        if len(asked) <= refusals:
            error = {"request_id": "r1", "error": {"code": "bad_signature", "message": "the letter is not for n2"}}
            await peer.publish(message.reply, json.dumps(error).encode())
            return
        for index in range(len(IDS)):
            reply = json.dumps(token("r1", index)).encode()
            await peer.publish(message.reply, reply[::-1], headers={"Content-Type": "sealed"})

    await peer.subscribe("resplit.v1.infer.adder", "ingress", cb=answer)
    await settle(peer)
    async with Client(server_url, keys=keys, sealer=Reverser(newest=2)) as client:
        if refusals == 1:
            answered = await client.complete("adder", "1+2=", request_id="r1")
            assert answered.token_ids == tuple(IDS)
        else:
            with pytest.raises(RequestError, match="not for n2"):
                await client.complete("adder", "1+2=", request_id="r1")
    assert len(asked) == 2


async def test_embeddings_come_in_the_order_of_the_texts(server_url: str, keys: Path, peer: Nats) -> None:
    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        assert body["input"] == ["a", "b"]
        data = [{"index": 1, "embedding": [0.5, 1.0]}, {"index": 0, "embedding": [0.25, 2.0]}]
        reply = {"request_id": body["request_id"], "data": data, "usage": USAGE}
        await peer.publish(message.reply, json.dumps(reply).encode())

    await serve(peer, handler)
    async with Client(server_url, keys=keys) as client:
        found = await client.embed("adder", ["a", "b"])
    assert (found.vectors, found.usage) == (((0.25, 2.0), (0.5, 1.0)), READ_USAGE)


async def test_tensors_travel_in_the_form_they_were_given(server_url: str, keys: Path, peer: Nats) -> None:
    async def handler(peer: Nats, message: Msg, body: dict[str, Any]) -> None:
        assert [i["name"] for i in body["inputs"]] == ["x", "y"]
        assert body["outputs"] == [{"name": "x"}, {"name": "y"}]
        reply = {k: body[k] for k in ("request_id", "id")} | {"model_name": "m", "usage": USAGE}
        packed = msgpack.packb(reply | {"outputs": body["inputs"]})
        await peer.publish(message.reply, packed, headers={"Content-Type": "application/msgpack"})

    await serve(peer, handler)
    given: dict[str, Tensor | tuple[list[int], str, list[Any] | bytes]] = {
        "x": ([2], "UINT8", b"\x01\x02"),
        "y": Tensor((1, 2), "FP32", [0.5, 1.5]),
    }
    async with Client(server_url, keys=keys) as client:
        found = await client.infer_tensors("adder", given, outputs=["x", "y"])
    assert found.outputs == {"x": Tensor((2,), "UINT8", b"\x01\x02"), "y": Tensor((1, 2), "FP32", [0.5, 1.5])}


async def test_a_request_too_large_for_the_server_is_refused_here(server_url: str, keys: Path) -> None:
    async with Client(server_url, keys=keys) as client:
        with pytest.raises(RequestError) as caught:
            await client.infer_tensors("adder", {"x": ([2 << 20], "UINT8", bytes(2 << 20))})
    assert caught.value.code == "payload_too_large"


async def test_no_server_is_told_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        async with asyncio.timeout(2):
            async with Client("nats://127.0.0.1:9"):
                pass
    assert caught.value.code == "unreachable"


async def test_a_client_outlives_a_restart_of_the_server(tmp_path: Path, members: Path, keys: Path) -> None:
    server = NatsServer(tmp_path, (members / CLUSTER / LOGINS_FILE).read_text, server_files(members / CLUSTER))
    await server.start()
    try:
        async with Client(server.url, keys=keys) as client:
            await server.child.kill()
            await server.start()
            peer = await connect(server.url, "n0", credentials=load_credentials(members / "n0"))
            await serve(peer, replying([0, 1, 2, 3]))
            async with asyncio.timeout(20):
                answer = await client.complete("adder", "1+2=")
            assert answer.token_ids == (11, 12, 13, 14)
            await peer.close()
    finally:
        await server.child.stop()


def test_an_application_gets_none_of_our_other_packages_from_the_client() -> None:
    ours = ["agent", "bus", "models", "orchestrator", "profiler", "schemas", "simulator"]
    check = f"import sys, resplit; resplit.Client; print([m for m in sys.modules if m.split('.')[0] in {ours}])"
    root = Path(resplit.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    tree = ast.parse((root / "resplit" / "__init__.py").read_text())
    assert {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names} == set()

"""Good requests, end to end: what comes back, in which order, and that it is what the unsplit model answers."""

import asyncio
import itertools
import json
from typing import Any

import numpy as np
import pytest

from resplit.replies import RequestError
from schemas import subjects
from schemas.audit import AuditKind
from schemas.codec import JSON, MSGPACK
from tests.integration.cluster_fixtures import CHAT, CNN, EMBED, N1, PROMPT, QUEUED, SLOTS, Serving, Streaming

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXTS = ("the quick brown fox", "six birds", "one two three four five six")


async def test_a_stream_is_accepted_first_and_then_says_each_token_once(shared: Serving) -> None:
    count = 12
    request = {"prompt": PROMPT, "max_tokens": count, "stream": True, "request_id": "a-stream", "ignore_eos": True}
    accepted, *tokens = await shared.bus.replies(CHAT, request)
    assert accepted == {"request_id": "a-stream", "status": "accepted", "deployment": CHAT, "epoch": 1}
    assert [token["index"] for token in tokens] == list(range(count))
    assert tuple(token["token_id"] for token in tokens) == shared.oracle.tokens(PROMPT, count)
    assert all("finish_reason" not in token and "usage" not in token for token in tokens[:-1])
    last = tokens[-1]
    assert last["finish_reason"] == "length"
    usage = last["usage"]
    prompt_tokens = len(shared.oracle.text.encode(PROMPT))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt_tokens, count)
    assert [(s["node"], s["first"], s["last"]) for s in usage["stages"]] == [("n0", 0, 1), ("n1", 2, 3), ("n2", 4, 5)]
    assert all(stage["calls"] == count and stage["compute_ms"] > 0 for stage in usage["stages"])
    assert 0 < usage["ttft_ms"] <= usage["total_ms"]
    spent = sum(stage["compute_ms"] + stage["queue_ms"] for stage in usage["stages"])
    assert spent + usage["network_ms"] <= 1.05 * usage["total_ms"] + 1


@pytest.mark.parametrize("content_type", [JSON, MSGPACK])
async def test_a_request_that_is_not_streamed_has_exactly_one_reply(shared: Serving, content_type: str) -> None:
    request = {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
    [reply] = await shared.bus.replies(CHAT, request, content_type)
    assert tuple(reply["token_ids"]) == shared.oracle.tokens(PROMPT, 8)
    assert reply["text"] == shared.oracle.text.decode(reply["token_ids"])
    assert reply["finish_reason"] == "length"
    assert "logprobs" not in reply


async def test_prompt_messages_and_token_ids_say_the_same(shared: Serving) -> None:
    messages = [{"role": "user", "content": "six birds"}]
    ids = shared.oracle.text.encode_messages(messages)
    answers = await asyncio.gather(
        shared.client.complete(CHAT, messages=messages, max_tokens=5, ignore_eos=True),
        shared.client.complete(CHAT, token_ids=ids, max_tokens=5, ignore_eos=True),
    )
    assert {answer.token_ids for answer in answers} == {shared.oracle.tokens(ids, 5)}


async def test_a_prompt_of_many_chunks_is_answered_as_unsplit(shared: Serving) -> None:
    prompt = [int(token) for token in np.random.default_rng(1).integers(4, 500, 700)]
    answer = await shared.client.complete(CHAT, token_ids=prompt, max_tokens=4, ignore_eos=True)
    assert answer.token_ids == shared.oracle.tokens(prompt, 4)


async def test_an_end_of_sequence_token_ends_it_unless_told_otherwise(shared: Serving) -> None:
    for start in range(3, 500):
        tokens = shared.oracle.tokens([0, start], 24)
        if 1 in tokens[:-1]:
            break
    else:
        pytest.skip("this model never ends within 24 tokens")
    stopped = await shared.client.complete(CHAT, token_ids=[0, start], max_tokens=24)
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[: tokens.index(1) + 1], "stop")
    ignored = await shared.client.complete(CHAT, token_ids=[0, start], max_tokens=24, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == (tokens, "length")


async def test_a_stop_string_across_tokens_ends_the_text_before_it(shared: Serving) -> None:
    whole = await shared.client.complete(CHAT, PROMPT, max_tokens=16, ignore_eos=True)
    pieces = [shared.oracle.text.decode([token]) for token in whole.token_ids]
    # A stop string made of the end of one token's text and the beginning of the next one's.
    at = next(i for i in range(4, 15) if all(p.isascii() and len(p) > 1 for p in pieces[i : i + 2]))
    stop = pieces[at][-1] + pieces[at + 1][:1]
    expected = whole.text[: whole.text.index(stop)]
    for stops in (stop, [stop, "never said"]):
        stopped = await shared.client.complete(CHAT, PROMPT, max_tokens=16, ignore_eos=True, stop=stops)
        assert (stopped.text, stopped.finish_reason) == (expected, "stop")
        assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
        assert len(stopped.token_ids) < 16


async def test_a_seed_makes_a_sampled_answer_reproducible(shared: Serving) -> None:
    async def sampled(seed: int | None) -> tuple[int, ...]:
        fields: dict[str, Any] = {"temperature": 2.0, "seed": seed, "max_tokens": 12, "ignore_eos": True}
        return (await shared.client.complete(CHAT, PROMPT, **fields)).token_ids

    one, again, other, unseeded, unseeded2 = await asyncio.gather(*map(sampled, (7, 7, 8, None, None)))
    assert one == again
    assert len({one, other, unseeded, unseeded2}) == 4


async def test_logprobs_are_those_of_the_unsplit_model(shared: Serving) -> None:
    answer = await shared.client.complete(CHAT, PROMPT, max_tokens=6, logprobs=3, ignore_eos=True)
    assert answer.logprobs is not None
    assert answer.top_logprobs is not None
    logits = shared.oracle.logits(PROMPT, 6)
    for token, logprob, top, row in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, logits, strict=True):
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert logprob == pytest.approx(expected[token], abs=1e-9)
        assert [entry.token_id for entry in top] == list(np.argsort(-expected, kind="stable")[:3])
        assert [entry.logprob for entry in top] == pytest.approx(sorted(expected, reverse=True)[:3], abs=1e-9)


@pytest.mark.parametrize("content_type", [JSON, MSGPACK])
async def test_vectors_are_those_of_the_unsplit_model(shared: Serving, content_type: str) -> None:
    reply = await shared.bus.ask(EMBED, {"input": list(TEXTS)}, content_type)
    assert [item["index"] for item in reply["data"]] == [0, 1, 2]
    for item, text in zip(reply["data"], TEXTS, strict=True):
        np.testing.assert_allclose(item["embedding"], shared.oracle.vector(text), atol=1e-5)
    assert reply["usage"]["prompt_tokens"] > 0


async def test_more_texts_than_slots_are_all_embedded_in_order(shared: Serving) -> None:
    texts = [" ".join(words) for words in itertools.permutations(("one", "two", "three", "four"), 3)] * 3
    found = await shared.client.embed(EMBED, texts)
    for vector, text in zip(found.vectors, texts, strict=True):
        np.testing.assert_allclose(vector, shared.oracle.vector(text), atol=1e-5)


async def test_tensors_come_back_in_the_form_they_came_in(shared: Serving) -> None:
    image = np.random.default_rng(2).normal(size=(2, 3, 32, 32)).astype(np.float32)
    expected = shared.oracle.classes(image)
    binary = await shared.client.infer_tensors(CNN, {"image": (image.shape, "FP32", image.tobytes())})
    raw = binary.outputs["classes"].data
    assert isinstance(raw, bytes)
    np.testing.assert_allclose(np.frombuffer(raw, np.float32).reshape(2, 10), expected, rtol=1e-5, atol=1e-6)
    inputs = [{"name": "image", "shape": list(image.shape), "datatype": "FP32", "data": image.reshape(-1).tolist()}]
    listed = await shared.bus.ask(CNN, {"id": "mine", "inputs": inputs, "outputs": [{"name": "classes"}]})
    assert (listed["id"], listed["model_name"]) == ("mine", "cnn")
    [output] = listed["outputs"]
    assert (output["name"], output["shape"], output["datatype"]) == ("classes", [2, 10], "FP32")
    assert np.array_equal(np.array(output["data"], np.float32), np.frombuffer(raw, np.float32))


async def test_a_full_queue_refuses_and_loses_nothing_it_accepted(shared: Serving) -> None:
    streams = [Streaming(shared.client, max_tokens=40) for _ in range(SLOTS + QUEUED + 12)]
    errors = [await stream.end() for stream in streams]
    ends = [(stream.ids, error) for stream, error in zip(streams, errors, strict=True)]
    refused = [error for ids, error in ends if error is not None and ids == ()]
    assert {error.code for error in refused} == {"overloaded"}
    answered = [ids for ids, error in ends if error is None]
    assert len(answered) >= SLOTS + QUEUED
    assert set(answered) == {shared.oracle.tokens(PROMPT, 40)}
    assert len(answered) + len(refused) == len(streams)
    await shared.answers()


async def test_an_explicit_cancel_ends_a_request_in_a_typed_error(shared: Serving) -> None:
    stream = await Streaming(shared.client, request_id="stop-me", max_tokens=1000).began()
    await shared.client.cancel("stop-me")
    error = await stream.end()
    assert error is not None
    assert (error.code, error.request_id) == ("cancelled", "stop-me")
    event = await shared.ear.wait(AuditKind.REQUEST_ENDED, request="stop-me")
    assert (event.fields["code"], event.deployment) == ("cancelled", CHAT)
    await shared.answers()


async def test_a_cancelled_request_that_waits_never_starts(shared: Serving) -> None:
    busy = [await Streaming(shared.client, max_tokens=400).began()]
    busy += [Streaming(shared.client, max_tokens=30) for _ in range(SLOTS + 1)]
    waiting = Streaming(shared.client, request_id="not-yet", max_tokens=900)
    await asyncio.sleep(0)
    await shared.client.cancel("not-yet")
    error = await waiting.end()
    assert error is not None
    assert (error.code, waiting.tokens) == ("cancelled", [])
    assert [await stream.end() for stream in busy] == [None] * len(busy)


async def test_a_vanished_client_frees_its_slot(shared: Serving) -> None:
    request = {"prompt": PROMPT, "max_tokens": 1000, "stream": True, "ignore_eos": True, "request_id": "ghost"}
    inbox = shared.bus.nats.new_inbox()
    subscription = await shared.bus.nats.subscribe(inbox)
    await shared.bus.nats.publish(subjects.infer(CHAT), json.dumps(request).encode(), inbox)
    for _ in range(3):
        await subscription.next_msg(10)
    await subscription.unsubscribe()
    event = await shared.ear.wait(AuditKind.REQUEST_ENDED, request="ghost")
    assert event.fields["code"] == "cancelled"
    # There is one slot of this length: it is free, or this would wait behind most of a thousand tokens.
    answer = await shared.client.complete(CHAT, PROMPT, max_tokens=300, ignore_eos=True)
    assert answer.token_ids == shared.oracle.tokens(PROMPT, 300)
    assert answer.usage.queued_ms < answer.usage.total_ms / 2


async def test_a_deadline_that_has_passed_is_refused_at_once(shared: Serving) -> None:
    for deadline_ms in (0, -1):
        with pytest.raises(RequestError) as caught:
            await shared.client.complete(CHAT, PROMPT, deadline_ms=deadline_ms)
        assert (caught.value.code, caught.value.field) == ("deadline_exceeded", "deadline_ms")


async def test_a_deadline_that_passes_while_tokens_flow_ends_the_request(shared: Serving) -> None:
    stream = await Streaming(shared.client, max_tokens=60, deadline_ms=1500).began()
    await shared.cluster.pause(N1)
    try:
        error = await stream.end()
    finally:
        await shared.cluster.resume(N1)
    assert error is not None
    assert (error.code, error.field) == ("deadline_exceeded", "deadline_ms")
    assert 0 < len(stream.tokens) < 60
    assert stream.ids == shared.oracle.tokens(PROMPT, 60)[: len(stream.tokens)]
    await shared.answers()


async def test_an_id_that_is_in_flight_is_refused_and_the_first_request_goes_on(shared: Serving) -> None:
    first = await Streaming(shared.client, request_id="twin", max_tokens=300).began()
    refusal = await shared.bus.ask(CHAT, {"prompt": "x", "request_id": "twin"})
    assert (refusal["error"]["code"], refusal["error"]["field"]) == ("invalid_request", "request_id")
    assert await first.end() is None
    assert first.ids == shared.oracle.tokens(PROMPT, 300)
    again = await shared.client.complete(CHAT, PROMPT, request_id="twin", max_tokens=2, ignore_eos=True)
    assert len(again.token_ids) == 2


async def test_prompts_that_take_long_to_read_are_refused_while_others_are_answered(shared: Serving) -> None:
    """A megabyte without a space takes a tokenizer with a large vocabulary a second: that is done in a thread."""
    hard = "a" * 1_000_000
    hostile = [asyncio.create_task(shared.refused(CHAT, {"prompt": hard + str(n)})) for n in range(3)]
    await asyncio.sleep(0.1)
    for number in range(5):
        answer = await shared.client.complete(CHAT, PROMPT, max_tokens=2, ignore_eos=True)
        assert answer.token_ids == shared.oracle.tokens(PROMPT, 2), number
    assert await asyncio.gather(*hostile) == [("context_exceeded", "prompt")] * 3

"""A cloud that answers what the cluster cannot: a real HTTP server, real agents, and what may never leave them."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from models.store import Store
from profiler.memory import memory_bytes
from resplit import control
from resplit.client import Client
from resplit.replies import RequestError
from resplit.sealing import Sealer
from schemas.audit import AuditKind
from schemas.base import DeploymentName
from schemas.deployment import Cloud as Outside
from schemas.deployment import Settings
from schemas.errors import ErrorCode, ResplitError
from tests.integration.cloud_server import KEY, Cloud, cloud_server
from tests.integration.cluster_fixtures import PROMPT, Oracle, Serving, Streaming, command, serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

LARGE = Settings(context_tokens=1024, max_sequences=1024, max_queued=64)
SMALL = Settings(context_tokens=1024, max_sequences=1, max_queued=0)
BARE_BYTES = 160_000_000
COUNT = 6
TIMEOUT_S = 1.5
BIG, LITTLE, SHY, CHANGING = (DeploymentName(name) for name in ("big", "little", "shy", "changing"))
EU = Outside(name="eu", model="big-1")


@pytest.fixture(scope="module")
def cloud(oracle: Oracle) -> Iterator[Cloud]:
    with cloud_server(oracle) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def edge(
    tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle, cloud: Cloud
) -> AsyncIterator[Serving]:
    """Two nodes, which have no room for `big` even together, but for `little`, of one slot and no queue."""
    need = sum(memory_bytes(block, LARGE) for block in zoo_store.manifest("llama").blocks)
    folder = tmp_path_factory.mktemp("edge")
    clouds = cloud.file(tmp_path_factory.mktemp("clouds"), timeout_s=TIMEOUT_S)
    memory = BARE_BYTES + round(0.3 * need)
    async with serving(folder, zoo_store, oracle, 2, memory_bytes=memory, clouds=clouds) as found:
        assert (await found.deploy(BIG, "llama", settings=LARGE, cloud=EU)).state == "cold"
        assert (await found.deploy(LITTLE, "llama", settings=SMALL, cloud=EU)).state == "serving"
        yield found


@pytest.fixture(autouse=True)
def well(cloud: Cloud) -> Iterator[None]:
    cloud.mood = "well"
    cloud.asked.clear()
    cloud.came.clear()
    cloud.free.clear()
    yield
    cloud.free.set()


async def refusal(client: Client, deployment: str, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await client.complete(deployment, PROMPT, max_tokens=COUNT, **fields)
    return caught.value


def events(edge: Serving, kind: AuditKind) -> list[dict[str, object]]:
    return [dict(event.fields) for event in edge.ear.heard if event.kind is kind]


async def until_it_is_asked_again(edge: Serving) -> None:
    """An agent that a cloud failed too often leaves it alone for a while; either may be asked next."""
    in_a_row = 0
    async with asyncio.timeout(60):
        while in_a_row < 6:
            in_a_row += 1
            try:
                await edge.client.complete(BIG, PROMPT, max_tokens=1, deadline_ms=1000)
            except RequestError:
                in_a_row = 0


async def test_what_no_node_has_room_for_is_answered_outside(edge: Serving, cloud: Cloud) -> None:
    answer = await edge.client.complete(BIG, PROMPT, max_tokens=COUNT)
    assert answer.token_ids == edge.oracle.tokens(PROMPT, COUNT)
    assert answer.text == edge.oracle.text.decode(answer.token_ids)
    assert answer.finish_reason == "length"
    use = answer.usage.cloud
    assert use is not None
    assert (use.name, use.model, use.prompt_tokens, use.completion_tokens) == ("eu", "big-1", 1000, 2000)
    assert use.cost == pytest.approx(1000 * 1.0e-6 + 2000 * 2.0e-6)
    path, said = cloud.asked[0]
    assert path == "/v1/completions"
    assert (said["model"], said["prompt"], said["max_tokens"]) == ("big-1", PROMPT, COUNT)
    assert cloud.keys == {f"Bearer {KEY}"}
    await edge.ear.wait(AuditKind.CLOUD_ASKED, cloud="eu", model="big-1", why="its model is not loaded")
    ended = await edge.ear.wait(AuditKind.REQUEST_ENDED, cloud="eu")
    assert ended.fields["cost"] == pytest.approx(use.cost)


async def test_status_tells_what_it_was_asked_and_what_that_cost(edge: Serving) -> None:
    await edge.client.complete(BIG, PROMPT, max_tokens=COUNT)
    await edge.until(lambda found: found.cloud is not None and found.cloud.answered > 0, BIG, 20)
    seen = {one.name: one for one in (await control.status(edge.cluster.operator)).deployments}
    found = seen[BIG].cloud
    assert found is not None
    assert found.nodes == ("n0", "n1")
    assert found.asked >= found.answered > 0
    assert found.mean_ms is not None and found.mean_ms > 0
    assert found.cost == pytest.approx(found.answered * 0.005)
    at = ["--url", edge.cluster.url, "--keys", str(edge.cluster.operator_keys)]
    code, said, _ = await command("status", *at)
    assert code == 0
    assert "cloud eu" in said


async def test_a_queue_that_is_full_overflows_to_the_cloud_and_what_runs_is_not_disturbed(edge: Serving) -> None:
    running = await Streaming(edge.client, deployment=LITTLE, max_tokens=300).began()
    answer = await edge.client.complete(LITTLE, PROMPT, max_tokens=COUNT)
    assert answer.usage.cloud is not None
    assert answer.token_ids == edge.oracle.tokens(PROMPT, COUNT)
    kept: list[dict[str, Any]] = [{"logprobs": 2}, {"ignore_eos": True}, {"top_k": 3}, {"edge_only": True}]
    refusals = await asyncio.gather(*(refusal(edge.client, LITTLE, **fields) for fields in kept))  # while it runs
    assert {one.code for one in refusals} == {"overloaded"}
    assert await running.end() is None
    assert len(running.tokens) == 300
    last = running.tokens[-1].usage
    assert last is not None and last.cloud is None
    here = await edge.client.complete(LITTLE, PROMPT, max_tokens=COUNT)
    assert here.usage.cloud is None, "it goes there only while the nodes cannot"


async def test_streams_and_stop_strings_are_said_as_a_node_would(edge: Serving) -> None:
    tokens = [token async for token in edge.client.stream(BIG, PROMPT, max_tokens=COUNT)]
    assert [token.index for token in tokens] == list(range(COUNT))
    whole = "".join(token.text for token in tokens)
    assert whole == edge.oracle.text.decode(edge.oracle.tokens(PROMPT, COUNT))
    stop = whole[len(whole) // 2 :]
    stopped = await edge.client.complete(BIG, PROMPT, max_tokens=COUNT, stop=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[: whole.index(stop)]
    by_ids = await edge.client.complete(BIG, token_ids=edge.oracle.text.encode(PROMPT), max_tokens=COUNT)
    assert by_ids.token_ids == edge.oracle.tokens(PROMPT, COUNT)


@pytest.mark.parametrize("mood", ["nonsense", "busy", "refusing", "endless", "slow"])
async def test_a_cloud_that_fails_ends_a_request_in_one_typed_error_in_time(
    edge: Serving, cloud: Cloud, mood: str
) -> None:
    running = await Streaming(edge.client, deployment=LITTLE, max_tokens=900).began()
    cloud.mood = mood  # type: ignore[assignment]
    async with asyncio.timeout(10):
        error = await refusal(edge.client, LITTLE)
    assert error.code in ("cloud_failed", "overloaded"), error  # the latter once it is left alone
    cloud.mood = "well"
    cloud.free.set()
    await running.end()
    await until_it_is_asked_again(edge)


async def test_one_that_failed_too_often_is_left_alone_and_that_is_audited(edge: Serving, cloud: Cloud) -> None:
    running = await Streaming(edge.client, deployment=LITTLE, max_tokens=900).began()
    cloud.mood = "refusing"
    codes = [(await refusal(edge.client, LITTLE)).code for _ in range(6)]
    asked = codes.count("cloud_failed")
    assert 1 <= asked <= 3
    assert codes == ["cloud_failed"] * asked + ["overloaded"] * (6 - asked)
    assert len(cloud.asked) == asked, "it is asked no more"
    assert await running.end() is None
    cloud.mood = "well"
    await until_it_is_asked_again(edge)
    async with asyncio.timeout(10):
        while [event["up"] for event in events(edge, AuditKind.CLOUD_CHANGED)][-2:] != [False, True]:
            await edge.client.complete(BIG, PROMPT, max_tokens=1)


async def test_what_waits_for_a_cold_model_goes_on_waiting_where_no_cloud_answers(edge: Serving, cloud: Cloud) -> None:
    cloud.mood = "slow"
    async with asyncio.timeout(15):
        error = await refusal(edge.client, BIG, deadline_ms=4000)
    assert error.code == "deadline_exceeded"
    cloud.mood = "well"
    cloud.free.set()
    await until_it_is_asked_again(edge)


async def test_nothing_that_must_not_leave_does(edge: Serving, cloud: Cloud) -> None:
    for private in ({"sealed": True}, {"sensitive": "ends"}):
        with pytest.raises(ResplitError) as caught:
            await edge.deploy(SHY, "llama", settings=SMALL, cloud=EU, **private)
        assert (caught.value.code, caught.value.field) == (ErrorCode.FORBIDDEN, "cloud")
    with pytest.raises(ResplitError) as caught:
        await edge.deploy(SHY, "llama", settings=SMALL, cloud=Outside(name="us", model="m"))
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "cloud.name")
    assert "eu, oip" in caught.value.message
    keys = edge.cluster.client_keys
    async with Client(edge.cluster.url, keys=keys, sealer=Sealer(keys)) as sealed:
        assert (await refusal(sealed, BIG, deadline_ms=1500)).code == "deadline_exceeded"
    assert (await refusal(edge.client, BIG, edge_only=True, deadline_ms=1500)).code == "deadline_exceeded"
    at = ["--url", edge.cluster.url, "--keys", str(edge.cluster.client_keys)]
    code, _, error = await command("infer", BIG, PROMPT, "--edge-only", "--deadline-ms", "1000", *at)
    assert code != 0
    assert "deadline" in error
    assert not cloud.asked


async def test_vectors_and_tensors(edge: Serving, cloud: Cloud) -> None:
    at = ["--url", edge.cluster.url, "--keys", str(edge.cluster.operator_keys)]
    code, _, error = await command("deploy", "cnn", "--queue", "0", "--sequences", "1", "--cloud", "oip=cnn", *at)
    assert code == 0, error
    await edge.deploy("embed", "embedder", settings=Settings(max_sequences=1, max_queued=0), cloud=EU)
    image = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    given = {"image": (image.shape, "FP32", image.tobytes())}
    found = await asyncio.gather(*(edge.client.infer_tensors("cnn", given) for _ in range(24)))
    outside = [one for one in found if one.usage.cloud is not None]
    assert outside
    assert outside[0].usage.cloud is not None and outside[0].usage.cloud.cost == 0.5
    for one in found:
        classes = np.frombuffer(one.outputs["classes"].data, np.float32)  # type: ignore[arg-type]
        np.testing.assert_allclose(classes, edge.oracle.classes(image).reshape(-1), rtol=1e-4, atol=1e-5)
    texts = ["a quick brown fox", "the lazy dog"]
    vectors = await asyncio.gather(*(edge.client.embed("embed", texts) for _ in range(24)))
    assert any(one.usage.cloud is not None for one in vectors)
    for each in vectors:
        for text, vector in zip(texts, each.vectors, strict=True):
            np.testing.assert_allclose(vector, edge.oracle.vector(text), rtol=1e-3, atol=1e-5)
    for name in ("cnn", "embed"):
        assert (await command("remove", name, *at))[0] == 0


async def test_a_model_on_demand_is_loaded_while_its_cloud_answers(edge: Serving, cloud: Cloud) -> None:
    fits_one = LARGE.model_copy(update={"max_sequences": 440})
    await edge.deploy(CHANGING, "llama", settings=fits_one, cloud=EU, on_demand=True)
    await edge.client.complete(CHANGING, PROMPT, max_tokens=1)
    await edge.deploy("rival", "llama", settings=fits_one, on_demand=True)
    await edge.client.complete("rival", PROMPT, max_tokens=1)
    await edge.until(lambda found: found.state == "cold", CHANGING, 30)
    cloud.asked.clear()
    answer = await edge.client.complete(CHANGING, PROMPT, max_tokens=COUNT)
    assert answer.usage.cloud is not None
    assert answer.token_ids == edge.oracle.tokens(PROMPT, COUNT)
    await edge.until(lambda found: found.state == "serving", CHANGING, 30)
    answer = await edge.client.complete(CHANGING, PROMPT, max_tokens=COUNT)
    assert answer.usage.cloud is None
    assert answer.token_ids == edge.oracle.tokens(PROMPT, COUNT)
    at = ["--url", edge.cluster.url, "--keys", str(edge.cluster.operator_keys)]
    for name in ("rival", CHANGING):
        assert (await command("remove", name, *at))[0] == 0


async def test_an_ingress_that_dies_while_the_cloud_thinks_loses_nothing(edge: Serving, cloud: Cloud) -> None:
    cloud.mood = "slow"
    asked = asyncio.create_task(edge.client.complete(BIG, PROMPT, max_tokens=COUNT, request_id="survives"))
    async with asyncio.timeout(20):
        await asyncio.to_thread(cloud.came.wait)
    door = (await edge.ear.wait(AuditKind.CLOUD_ASKED, request="survives")).source
    await edge.cluster.kill(door)
    cloud.mood = "well"
    async with asyncio.timeout(60):
        answer = await asked
    assert answer.token_ids == edge.oracle.tokens(PROMPT, COUNT)
    assert len(cloud.asked) >= 2
    cloud.free.set()
    await edge.cluster.start(door)
    edge.alive()

"""A multimodal pipeline on four agents: eight services, four tasks, a replica killed, a burst of load."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from bus.identity import ORCHESTRATOR
from models.store import Store
from resplit import control
from resplit.client import Client
from resplit.replies import RequestError, Tensor, TensorResult
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.control import DeploymentStatus
from schemas.errors import ErrorCode, ResplitError
from schemas.pipeline import service_deployment
from schemas.tensor import OIP_TO_NUMPY, Array
from tests.integration.cluster_fixtures import Oracle, Serving, command, serving
from tests.multimodal import Composed, image, import_assistant

pytestmark = pytest.mark.asyncio(loop_scope="session")

ASSISTANT = DeploymentName("assistant")
QUESTION, CAPTION, COMMAND = "what stands on the left?", "a red lorry in the rain", "turn left behind the bridge"
TOKENS = 8
PATIENT_MS = 30_000
"""A client's own deadline: what is tested here is not how fast these machines are."""
STEERED_S = 60.0
ENDED_S = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def assistant(
    tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, minilm: Store, oracle: Oracle
) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("assistant")
    shutil.copytree(zoo_store.root, folder / "store")
    shutil.copytree(minilm.root, folder / "store", dirs_exist_ok=True)
    store = Store(folder / "store")
    import_assistant(folder / "models", store)
    async with serving(folder / "cluster", store, oracle, agents=4) as running:
        await running.deploy(ASSISTANT, "assistant")
        yield running


@pytest.fixture(scope="module")
def composed(assistant: Serving) -> Composed:
    """The same services in this process."""
    return Composed(Store(assistant.cluster.store))


async def ask(client: Client, task: str, seed: int = 0, **fields: Any) -> TensorResult:
    given: dict[str, Any] = {"image": ([1, 3, 32, 32], "FP32", image(seed).tobytes())}
    for name in ("question", "caption", "command"):
        if name in fields:
            given[name] = ([1], "BYTES", [fields.pop(name)])
    return await client.infer_tensors(
        ASSISTANT, given, parameters={"task": task}, **{"deadline_ms": PATIENT_MS, **fields}
    )


def array(tensor: Tensor) -> Array:
    assert isinstance(tensor.data, bytes)
    return np.frombuffer(tensor.data, OIP_TO_NUMPY[tensor.datatype]).reshape(tensor.shape)


def alike(found: Tensor, wanted: Array) -> None:
    np.testing.assert_allclose(array(found), wanted, rtol=1e-4, atol=1e-5)


async def states(running: Serving) -> dict[str, DeploymentStatus]:
    """By name, as whoever leads sees them; while nobody does, one waits."""
    async with asyncio.timeout(STEERED_S):
        while True:
            try:
                seen = await control.status(running.cluster.operator)
            except ResplitError as error:
                assert error.code is ErrorCode.UNREACHABLE
                await asyncio.sleep(0.2)
            else:
                return {found.name: found for found in seen.deployments}


def nodes_of(found: DeploymentStatus) -> list[str]:
    assert found.current is not None
    return [stage.node for chain in found.current.chains for stage in chain]


async def test_every_task_is_answered_as_by_its_services_in_one_process(assistant: Serving, composed: Composed) -> None:
    for seed in range(2):
        one = await ask(assistant.client, "question-answering", seed, question=QUESTION)
        assert array(one.outputs["tokens"])[0].tolist() == composed.tokens(image(seed), QUESTION, TOKENS)
        alike(one.outputs["answer"], composed.answer(image(seed), QUESTION))
        assert one.outputs["text"].data == [assistant.oracle.text.decode(array(one.outputs["tokens"])[0].tolist())]
        two = await ask(assistant.client, "cross-modal", seed, caption=CAPTION)
        alike(two.outputs["fused"], composed.fused(image(seed), CAPTION))
        three = await ask(assistant.client, "classification", seed)
        alike(three.outputs["classes"], composed.classes(image(seed)))
        four = await ask(assistant.client, "driving", seed, command=COMMAND)
        alike(four.outputs["controls"], composed.controls(image(seed), COMMAND))


async def test_the_answer_says_which_nodes_did_what(assistant: Serving) -> None:
    answer = await ask(assistant.client, "driving", command=COMMAND)
    steps = {step.service: step for step in answer.usage.steps}
    assert steps.keys() == {"vision", "text", "fusion", "controls"}
    found = await states(assistant)
    for service, step in steps.items():
        assert set(step.nodes) <= set(nodes_of(found[service_deployment(ASSISTANT, service)]))
    assert steps["fusion"].waited_ms >= max(steps["vision"].total_ms, steps["text"].total_ms)


async def test_core_services_can_do_without_a_node_and_the_trail_says_so(assistant: Serving) -> None:
    placed = await assistant.ear.wait(AuditKind.SERVICES_PLACED, deployment=ASSISTANT)
    assert placed.fields["reason"] == "the core services were placed"
    found = await states(assistant)
    for service in ("vision", "text"):
        assert len(set(nodes_of(found[service_deployment(ASSISTANT, service)]))) >= 2
    assert len(nodes_of(found[service_deployment(ASSISTANT, "backbone")])) == 2
    assert len(set(nodes_of(found[ASSISTANT]))) == 2


@pytest.mark.parametrize(
    ("parameters", "inputs", "field"),
    [
        ({"task": "poetry"}, {}, "parameters.task"),
        ({}, {}, "parameters.task"),
        ({"task": "driving"}, {}, "inputs"),
        ({"task": "classification"}, {"command": ([1], "BYTES", ["left"])}, "inputs.1.name"),
        ({"task": "driving"}, {"command": ([1], "FP32", [1.0])}, "inputs.1.datatype"),
        ({"task": "driving"}, {"command": ([2], "BYTES", ["left", "right"])}, "inputs.1.shape"),
        ({"task": "driving"}, {"command": ([1], "BYTES", [3])}, "inputs.1.data"),
    ],
)
async def test_what_a_task_does_not_take_is_refused_by_name(
    assistant: Serving, parameters: dict[str, str], inputs: dict[str, Any], field: str
) -> None:
    given = {"image": ([1, 3, 32, 32], "FP32", image(0).tobytes()), **inputs}
    with pytest.raises(RequestError) as refused:
        await assistant.client.infer_tensors(ASSISTANT, given, parameters=parameters)
    assert (refused.value.code, refused.value.field) == ("invalid_request", field)


async def test_a_prompt_is_told_what_a_pipeline_takes(assistant: Serving) -> None:
    with pytest.raises(RequestError, match="is a pipeline: send `inputs`"):
        await assistant.client.complete(ASSISTANT, "hello")


async def test_who_has_no_time_gets_no_answer_and_no_service_goes_on(assistant: Serving) -> None:
    with pytest.raises(RequestError) as late:
        await ask(assistant.client, "question-answering", question=QUESTION, deadline_ms=1)
    assert late.value.code in ("deadline_exceeded", "deadline_unattainable")  # by the pipeline, or by a service
    await ask(assistant.client, "classification")


async def test_a_service_is_nobodys_to_change_but_its_pipelines(assistant: Serving) -> None:
    with pytest.raises(ResplitError, match="is service 'vision' of pipeline 'assistant'"):
        await control.remove(assistant.cluster.operator, service_deployment(ASSISTANT, "vision"))
    with pytest.raises(ResplitError, match="is service 'fusion' of pipeline 'assistant'"):
        await assistant.deploy(service_deployment(ASSISTANT, "fusion"), "llama")


async def test_a_request_survives_the_replica_that_worked_on_it(assistant: Serving, composed: Composed) -> None:
    wanted = {seed: composed.tokens(image(seed), QUESTION, TOKENS) for seed in range(3)}
    victim = NodeId(nodes_of((await states(assistant))[service_deployment(ASSISTANT, "fusion")])[0])
    asked = []
    for number in range(40):
        one = ask(assistant.client, "question-answering", number % 3, question=QUESTION)
        asked.append(asyncio.create_task(one))
        await asyncio.sleep(0.1)
        if number == 15:
            await assistant.cluster.kill(victim)
    for number, answer in enumerate(await asyncio.gather(*asked)):
        assert array(answer.outputs["tokens"])[0].tolist() == wanted[number % 3]
    await assistant.ear.wait(AuditKind.NODE_LOST, node=victim)
    for service in ("vision", "text", "fusion"):
        called = service_deployment(ASSISTANT, service)
        await assistant.until(lambda found: found.current is not None and victim not in nodes_of(found), called)
    await assistant.cluster.start(victim)


async def test_light_services_follow_the_load(assistant: Serving) -> None:
    called = service_deployment(ASSISTANT, "classes")
    before = len(nodes_of((await states(assistant))[called]))
    asked: list[asyncio.Task[TensorResult]] = []
    over = asyncio.Event()

    async def burst() -> None:
        a_second = 60.0  # and more and more: how much one replica can do is the machine's affair
        while not over.is_set():
            asked.append(asyncio.create_task(ask(assistant.client, "classification", deadline_ms=60_000)))
            await asyncio.sleep(1 / a_second)
            a_second += 10.0 / a_second

    bursting = asyncio.create_task(burst())
    try:
        await assistant.until(
            lambda found: found.current is not None and len(found.current.chains) > before, called, STEERED_S
        )
    finally:
        over.set()
        await bursting
    ends = await asyncio.gather(*asked, return_exceptions=True)
    failed = [end for end in ends if not isinstance(end, TensorResult)]
    assert all(isinstance(end, RequestError) and end.code == ErrorCode.OVERLOADED.value for end in failed), failed
    steered = await assistant.ear.wait(AuditKind.SERVICES_STEERED, deployment=ASSISTANT)
    assert "added classes on" in str(steered.fields["reason"])
    await assistant.until(lambda found: found.current is not None and len(found.current.chains) == 1, called, STEERED_S)


async def test_the_command_asks_a_pipeline(assistant: Serving, composed: Composed, tmp_path: Path) -> None:
    np.save(tmp_path / "camera.npy", image(4))
    login = ("--keys", str(assistant.cluster.client_keys), "--url", assistant.cluster.url)
    given = ("--task", "driving", "--input", f"image=@{tmp_path / 'camera.npy'}", "--input", f"command={COMMAND}")
    code, out, error = await command("infer", ASSISTANT, *given, *login, "--json")
    assert code == 0, error
    found = json.loads(out)["outputs"]["controls"]["data"]
    np.testing.assert_allclose([found], composed.controls(image(4), COMMAND), rtol=1e-4, atol=1e-5)
    code, out, error = await command("infer", ASSISTANT, *given, *login)
    assert out.startswith("controls FP32[1, 2]: "), error
    operator = ("--keys", str(assistant.cluster.operator_keys), "--url", assistant.cluster.url)
    code, out, error = await command("explain", ASSISTANT, *operator)
    assert code == 0, error
    assert "vision" in out
    assert "driving" in out
    code, _, error = await command("plan", ASSISTANT, "--dry-run", *operator)
    assert (code, "see `resplit explain assistant`" in error) == (2, True)
    code, _, error = await command("infer", ASSISTANT, *login)
    assert code == 2
    assert "--input NAME=VALUE" in error


async def test_what_is_sealed_stays_so_between_services(assistant: Serving, composed: Composed) -> None:
    from resplit.sealing import Sealer  # noqa: PLC0415

    await assistant.deploy("confidential", "assistant", sealed=True)
    keys = assistant.cluster.client_keys
    async with Client(assistant.cluster.url, keys=keys, sealer=Sealer(keys)) as client:
        given: dict[str, Any] = {
            "image": ([1, 3, 32, 32], "FP32", image(5).tobytes()),
            "command": ([1], "BYTES", [COMMAND]),
        }
        answer = await client.infer_tensors("confidential", given, parameters={"task": "driving"})
    alike(answer.outputs["controls"], composed.controls(image(5), COMMAND))
    with pytest.raises(RequestError, match="takes sealed requests alone"):
        await assistant.client.infer_tensors("confidential", given, parameters={"task": "driving"})
    code, _, error = await command(
        "remove", "confidential", "--keys", str(assistant.cluster.operator_keys), "--url", assistant.cluster.url
    )
    assert code == 0, error


async def test_another_leader_finds_services_where_they_are(assistant: Serving) -> None:
    async def epochs() -> dict[str, int]:
        return {name: one.current.epoch for name, one in (await states(assistant)).items() if one.current is not None}

    async with asyncio.timeout(STEERED_S):
        while any(one.state != "serving" for one in (await states(assistant)).values()):  # noqa: ASYNC110 (as asked)
            await asyncio.sleep(0.2)
    before = await epochs()
    await assistant.cluster.kill(ORCHESTRATOR)
    await ask(assistant.client, "driving", command=COMMAND)
    await assistant.cluster.start(ORCHESTRATOR)
    await states(assistant)
    await assistant.until(lambda found: found.state == "serving", ASSISTANT)
    await asyncio.sleep(3.0)  # in which they would be placed, and steered twice
    moved = {name for name, epoch in (await epochs()).items() if before.get(name) != epoch}
    assert not moved - {service_deployment(ASSISTANT, "backbone")}, moved  # that one is weighed like any deployment
    await ask(assistant.client, "driving", command=COMMAND)


async def test_with_a_pipeline_its_services_end(assistant: Serving) -> None:
    await control.remove(assistant.cluster.operator, ASSISTANT)
    async with asyncio.timeout(ENDED_S):
        while any(name.startswith("assistant") for name in await states(assistant)):  # noqa: ASYNC110 (as asked)
            await asyncio.sleep(0.2)
    with pytest.raises(RequestError) as gone:
        await ask(assistant.client, "classification")
    assert gone.value.code == "unknown_deployment"

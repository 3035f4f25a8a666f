"""The front door with the model that is shipped: deploy, ask, explain, watch, remove, as an operator would."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import resplit
import resplit.demo
from resplit import Client, RequestError, control
from resplit.cluster import LocalCluster
from resplit.exits import Exit
from schemas.errors import ResplitError
from tests.integration.cluster_fixtures import command

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(resplit.__file__).parents[1]
COMMAND_S = 90


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shipped store, so that nothing is written into the installation."""
    try:
        shipped = resplit.demo.shipped_store()
    except ResplitError:
        pytest.skip("this checkout has no trained adder")
    return Path(shutil.copytree(shipped, tmp_path_factory.mktemp("adder") / "store"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory, store: Path) -> AsyncIterator[LocalCluster]:
    """Two agents; each test leaves nothing deployed."""
    async with LocalCluster(tmp_path_factory.mktemp("adder") / "cluster", store, agents=2) as running:
        yield running


async def run(*arguments: str) -> tuple[int, str, str]:
    """Run `resplit` as a process: (exit code, stdout, stderr)."""
    command = [sys.executable, "-m", "resplit", *arguments]
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(COMMAND_S):
        out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


async def test_a_deployment_says_why_it_runs_as_it_does_and_what_would_be_done_now(cluster: LocalCluster) -> None:
    at = ["--url", cluster.url, "--keys", str(cluster.operator_keys)]
    nothing = await command("explain", *at)
    assert nothing[:2] == (Exit.OK, "no deployment has a plan yet; see `resplit status`\n")
    assert (await command("deploy", "adder", "--name", "why", "--stages", "2", "--context", "64", *at))[0] == Exit.OK

    code, out, error = await command("explain", "why", *at)
    assert code == Exit.OK, error
    assert out.startswith("why, epoch 1: the deployment has no plan yet; 2 stage(s)")
    assert "Epoch 1 stays (" in out
    assert "why not" in out
    assert "no plan has less than Phi" in out

    [decision] = json.loads((await command("explain", "--json", *at))[1])["decisions"]
    assert (decision["deployment"], decision["epoch"], decision["action"]) == ("why", 1, "keep")
    assert decision["candidates"][0]["origin"] == "current"
    assert decision["bound"] <= decision["candidates"][0]["phi"]

    planned = json.loads((await command("plan", "--dry-run", "why", "--json", *at))[1])["decision"]
    assert planned["candidates"][0]["routes"] == decision["candidates"][0]["routes"]
    code, _, error = await command("plan", "why", *at)
    assert (code, "--dry-run" in error) == (Exit.USAGE, True)

    code, out, _ = await command("explain", "why", "--epoch", "1", *at)
    assert code == Exit.OK
    assert "the deployment has no plan yet" in out
    assert "committed: every node of epoch 1 is ready" in out
    assert "FORGED" not in out
    assert "unverified" not in out
    for missing in (["explain", "nobody"], ["plan", "--dry-run", "nobody"], ["explain", "--epoch", "9"]):
        assert (await command(*missing, *at))[0] == Exit.NOT_FOUND
    assert (await command("remove", "why", *at))[0] == Exit.OK
    async with asyncio.timeout(COMMAND_S):
        while (await control.status(cluster.operator)).deployments:  # noqa: ASYNC110 (it drains first)
            await asyncio.sleep(0.1)


async def test_a_model_is_deployed_asked_watched_and_removed(cluster: LocalCluster) -> None:
    at = ["--url", cluster.url, "--keys", str(cluster.operator_keys)]
    deployed = await run("deploy", "adder", "--stages", "2", "--context", "64", "--json", *at)
    assert deployed[0] == Exit.OK, deployed[2]
    plan = json.loads(deployed[1])["current"]
    assert len(plan["routes"][0]["stages"]) == 2

    async with Client(cluster.url, keys=cluster.client_keys) as client:
        answers = await asyncio.gather(*(client.complete("adder", "12+34=", max_tokens=8) for _ in range(5)))
    assert len({answer.token_ids for answer in answers}) == 1
    client_at = ["--url", cluster.url, "--keys", str(cluster.client_keys)]
    said = await run("infer", "adder", "12+34=", "--max-tokens", "8", *client_at)
    assert said[:2] == (Exit.OK, answers[0].text + "\n")
    lines = (await command("infer", "adder", "12+34=", "--max-tokens", "8", "--json", *client_at))[1].splitlines()
    assert [json.loads(line)["token_id"] for line in lines] == list(answers[0].token_ids)

    seen: dict[str, Any] = json.loads((await command("status", "--json", *at))[1])
    assert [(d["name"], d["state"]) for d in seen["deployments"]] == [("adder", "serving")]
    told = (await command("events", "--json", *at))[1].splitlines()
    events = [json.loads(line) for line in told]
    assert {"node_joined", "plan_prepared", "plan_committed"} <= {event["kind"] for event in events}
    assert {event["standing"] for event in events} == {"verified"}

    assert (await run("remove", "adder", "--json", *at))[0] == Exit.OK
    assert (await command("remove", "never-there", *at))[0] == Exit.NOT_FOUND
    async with Client(cluster.url, keys=cluster.client_keys) as client:
        for _ in range(100):  # it drains first
            try:
                await client.complete("adder", "1+2=", max_tokens=1)
            except RequestError as error:
                assert error.code == "unknown_deployment"
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("a removed deployment still answers")


async def test_the_demonstration_finds_every_answer_identical(store: Path) -> None:
    code, out, error = await run("demo", "--agents", "2", "--requests", "6", "--json", "--store", str(store))
    assert code == Exit.OK, error
    found = json.loads(out)
    assert (found["ok"], found["answers"], found["identical"], found["errors"]) == (True, 6, 6, [])
    assert {stage["node"] for stage in found["stages"]} == {"n0", "n1"}

"""The front door with the model that is shipped: deploy, ask, watch, remove, as an operator would."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import resplit
import resplit.demo
from resplit import Client, RequestError
from resplit.cluster import LocalCluster
from resplit.exits import Exit
from schemas.errors import ResplitError

ROOT = Path(resplit.__file__).parents[1]
COMMAND_S = 90


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy of the shipped store, so that nothing is written into the installation."""
    try:
        shipped = resplit.demo.shipped_store()
    except ResplitError:
        pytest.skip("this checkout has no trained adder")
    return Path(shutil.copytree(shipped, tmp_path / "store"))


async def run(*arguments: str) -> tuple[int, str, str]:
    """Run `resplit` as a process: (exit code, stdout, stderr)."""
    command = [sys.executable, "-m", "resplit", *arguments]
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(COMMAND_S):
        out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


async def test_a_model_is_deployed_asked_watched_and_removed(tmp_path: Path, store: Path) -> None:
    async with LocalCluster(tmp_path / "cluster", store, agents=2) as cluster:
        at = ["--url", cluster.url]
        deployed = await run("deploy", "adder", "--stages", "2", "--context", "64", "--json", *at)
        assert deployed[0] == Exit.OK, deployed[2]
        plan = json.loads(deployed[1])["current"]
        assert len(plan["routes"][0]["stages"]) == 2

        async with Client(cluster.url) as client:
            answers = await asyncio.gather(*(client.complete("adder", "12+34=", max_tokens=8) for _ in range(5)))
        assert len({answer.token_ids for answer in answers}) == 1
        said = await run("infer", "adder", "12+34=", "--max-tokens", "8", *at)
        assert said[:2] == (Exit.OK, answers[0].text + "\n")
        lines = (await run("infer", "adder", "12+34=", "--max-tokens", "8", "--json", *at))[1].splitlines()
        assert [json.loads(line)["token_id"] for line in lines] == list(answers[0].token_ids)

        seen: dict[str, Any] = json.loads((await run("status", "--json", *at))[1])
        assert [(d["name"], d["state"]) for d in seen["deployments"]] == [("adder", "serving")]
        told = (await run("events", "--json", "--keys", str(cluster.keys), *at))[1].splitlines()
        events = [json.loads(line) for line in told]
        assert {"node_joined", "plan_prepared", "plan_committed"} <= {event["kind"] for event in events}
        assert {event["standing"] for event in events} == {"verified"}

        assert (await run("remove", "adder", "--json", *at))[0] == Exit.OK
        assert (await run("remove", "never-there", *at))[0] == Exit.NOT_FOUND
        async with Client(cluster.url) as client:
            for _ in range(100):  # it drains first
                try:
                    await client.complete("adder", "1+2=", max_tokens=1)
                except RequestError as error:
                    assert error.code == "unknown_deployment"
                    break
                await asyncio.sleep(0.1)
            else:
                raise AssertionError("a removed deployment still answers")


async def test_what_does_not_fit_is_refused(tmp_path: Path, store: Path) -> None:
    async with LocalCluster(tmp_path / "cluster", store, agents=1, memory_bytes=1 << 20) as cluster:
        code, _, error = await run("deploy", "adder", "--url", cluster.url)
        assert (code, error.count("\n")) == (Exit.REFUSED, 1)


async def test_the_demonstration_finds_every_answer_identical(store: Path) -> None:
    code, out, error = await run("demo", "--agents", "2", "--requests", "6", "--json", "--store", str(store))
    assert code == Exit.OK, error
    found = json.loads(out)
    assert (found["ok"], found["answers"], found["identical"], found["errors"]) == (True, 6, 6, [])
    assert {stage["node"] for stage in found["stages"]} == {"n0", "n1"}

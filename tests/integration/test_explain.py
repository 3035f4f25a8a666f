"""`resplit explain` and `resplit plan --dry-run` on a real cluster, as an operator would use them."""

import json
import shutil
from pathlib import Path

import pytest

import resplit.demo
from resplit.cluster import LocalCluster
from resplit.exits import Exit
from schemas.errors import ResplitError
from tests.integration.test_cluster_adder import run


async def test_a_deployment_says_why_it_runs_as_it_does_and_what_would_be_done_now(tmp_path: Path) -> None:
    try:
        shipped = resplit.demo.shipped_store()
    except ResplitError:
        pytest.skip("this checkout has no trained adder")
    store = Path(shutil.copytree(shipped, tmp_path / "store"))
    async with LocalCluster(tmp_path / "cluster", store, agents=2) as cluster:
        at = ["--url", cluster.url]
        nothing = await run("explain", *at)
        assert nothing[:2] == (Exit.OK, "no deployment has a plan yet; see `resplit status`\n")
        assert (await run("deploy", "adder", "--stages", "2", "--context", "64", *at))[0] == Exit.OK

        code, out, error = await run("explain", "adder", *at)
        assert code == Exit.OK, error
        assert out.startswith("adder, epoch 1: the deployment has no plan yet; 2 stage(s)")
        assert "Epoch 1 stays (" in out
        assert "why not" in out
        assert "no plan has less than Phi" in out

        [decision] = json.loads((await run("explain", "--json", *at))[1])["decisions"]
        assert (decision["deployment"], decision["epoch"], decision["action"]) == ("adder", 1, "keep")
        assert decision["candidates"][0]["origin"] == "current"
        assert decision["bound"] <= decision["candidates"][0]["phi"]

        planned = json.loads((await run("plan", "--dry-run", "adder", "--json", *at))[1])["decision"]
        assert planned["candidates"][0]["routes"] == decision["candidates"][0]["routes"]
        code, _, error = await run("plan", "adder", *at)
        assert (code, "--dry-run" in error) == (Exit.USAGE, True)

        code, out, _ = await run("explain", "adder", "--epoch", "1", "--keys", str(cluster.keys), *at)
        assert code == Exit.OK
        assert "the deployment has no plan yet" in out
        assert "committed: every node of epoch 1 is ready" in out
        assert "FORGED" not in out
        assert "unverified" not in out
        for missing in (["explain", "nobody"], ["plan", "--dry-run", "nobody"], ["explain", "--epoch", "9"]):
            assert (await run(*missing, *at))[0] == Exit.NOT_FOUND

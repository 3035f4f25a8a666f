"""`resplit deploy --private 1` on real processes: the ends on the one trusted node, the middle at the edge."""

import shutil
from pathlib import Path

import pytest

import resplit.demo
from bus.together import make_members
from models.store import Store
from resplit import Client, control
from resplit.cluster import LocalCluster
from resplit.exits import Exit
from schemas.base import NodeId
from schemas.errors import ResplitError
from schemas.manifest import BlobRef, Block
from tests.integration.cluster_fixtures import command

N0, N1 = NodeId("n0"), NodeId("n1")
MEMORY_BYTES = 400_000_000
"""Of which an agent itself takes some 120 to 150 MB. With the caches of so many sequences the model takes 296 MB, and
its four private blocks 77: neither node has room for all."""
SEQUENCES = "1024"
LAST = 9
PRIVATE = {0, 1, LAST - 1, LAST}


def files(block: Block) -> tuple[BlobRef, ...]:
    """Some are equal in several blocks, and are one file."""
    return (block.graph, *block.weights)


async def test_private_blocks_stay_on_the_trusted_node_and_the_answer_is_the_same(tmp_path: Path) -> None:
    try:
        store = Path(shutil.copytree(resplit.demo.shipped_store(), tmp_path / "store"))
    except ResplitError:
        pytest.skip("this checkout has no trained adder")
    make_members(tmp_path / "cluster" / "keys", [N0, N1], edge=[N1])
    async with LocalCluster(tmp_path / "cluster", store, 2, threads=1, memory_bytes=MEMORY_BYTES) as cluster:
        at = ["--url", cluster.url, "--keys", str(cluster.operator_keys), "--context", "64", "--sequences", SEQUENCES]
        code, _, error = await command("deploy", "adder", "--private", "1", *at)
        assert code == Exit.OK, error
        [found] = (await control.status(cluster.operator)).deployments
        assert found.deployment is not None and found.deployment.sensitive == "ends:1"
        assert found.current is not None
        stages = found.current.routes[0].stages
        assert [stage.node for stage in stages] == [N0, N1, N0], "a U: it comes back to whom it left"
        assert not PRIVATE.intersection(found.current.blocks_on(N1))
        manifest = Store(store).manifest("adder")
        edge = Store(cluster.folder / N1 / "store")
        middle = {file.digest for block in found.current.blocks_on(N1) for file in files(manifest.blocks[block])}
        private = {file.digest for block in PRIVATE for file in files(manifest.blocks[block])}
        assert all(edge.has(digest) for digest in middle)
        assert private - middle and not any(edge.has(digest) for digest in private - middle)
        async with Client(cluster.url, keys=cluster.client_keys) as client:
            answer = await client.complete("adder", "12+30=", max_tokens=2, ignore_eos=True)
        assert answer.text.startswith("24"), "42, its digits from the last to the first"

        code, _, error = await command("deploy", "adder", "--private", "9", *at)
        assert code != Exit.OK
        assert "resplit trust NODE" in error and "keep fewer blocks private" in error
        [after] = (await control.status(cluster.operator)).deployments
        assert after.deployment == found.deployment, "what was refused is not there, and nothing else changed"
        code, _, error = await command("deploy", "adder", "--private", "1", "--sensitive", "ends", *at)
        assert code != Exit.OK
        assert "give one" in error

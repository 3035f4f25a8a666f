"""The fifteen lines of the documentation, run as they stand: nats-py alone is enough for text and vectors."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import resplit.demo
from models.importer import import_model
from models.store import Store
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait
from schemas.base import DeploymentName
from schemas.control import DeployRequest
from tests import model_zoo

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "fifteen_lines.py"


async def test_fifteen_lines_of_nats_py_stream_a_completion_and_get_an_embedding(tmp_path: Path) -> None:
    code = [line for line in SCRIPT.read_text().splitlines() if line.strip() and not line.startswith(('"""', "import"))]
    assert len(code) <= 15
    store = Store(Path(shutil.copytree(resplit.demo.shipped_store(), tmp_path / "store")))
    import_model(str(model_zoo.minilm_folder()), store, "minilm")
    async with LocalCluster(tmp_path / "cluster", store.root, agents=3) as cluster:
        for name in ("adder", "minilm"):
            await deploy_and_wait(cluster.url, DeployRequest(name=DeploymentName(name), model=name, stages=3), 60)
        process = await asyncio.create_subprocess_exec(
            sys.executable, SCRIPT, cluster.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    completion, embedding = out.decode().split("\n")[:2]
    assert completion == "3261|1623"
    assert len(embedding.strip(" []").split(",")) == 4

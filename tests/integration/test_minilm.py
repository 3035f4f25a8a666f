"""all-MiniLM-L6-v2 with its published weights, cut into its six layers and split over three agents; and beside it
the shipped adder, for the fifteen lines of the documentation."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

import resplit.demo
from agent.tensors import pool, text_inputs
from models.reference import Reference
from models.store import Store
from models.text import Text
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait
from schemas.base import DeploymentName
from schemas.control import DeployRequest
from schemas.manifest import ModelKind

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "fifteen_lines.py"
SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Someone performs music with a guitar in front of an audience.",
    "The quarterly report shows falling profits.",
    "a",
    "Edge nodes share one large model. " * 12,
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory, minilm: Store) -> AsyncIterator[LocalCluster]:
    """Three agents that serve `minilm` and the shipped `adder`, a stage each."""
    folder = tmp_path_factory.mktemp("shipped")
    shutil.copytree(minilm.root, folder / "store")
    shutil.copytree(resplit.demo.shipped_store(), folder / "store", dirs_exist_ok=True)
    async with LocalCluster(folder / "cluster", folder / "store", agents=3) as cluster:
        for name in ("adder", "minilm"):
            await deploy_and_wait(cluster.operator, DeployRequest(name=DeploymentName(name), model=name, stages=3), 60)
        yield cluster


def test_minilm_is_cut_into_its_six_layers(minilm: Store) -> None:
    manifest = minilm.manifest("minilm")
    assert manifest.kind is ModelKind.EMBEDDER
    assert [block.role for block in manifest.blocks].count("layer") == 6
    assert manifest.blocks[0].role == "embedding"


@pytest.mark.asyncio(loop_scope="module")
async def test_minilm_embeddings_equal_the_unsplit_model_and_make_sense(minilm: Store, cluster: LocalCluster) -> None:
    manifest = minilm.manifest("minilm")
    assert manifest.text is not None
    reference = Reference(minilm, "minilm")
    text = Text(manifest.text, minilm.path(manifest.text.tokenizer.digest))
    async with Client(cluster.url, keys=cluster.client_keys) as client:
        got = np.asarray((await client.embed("minilm", SENTENCES)).vectors)
    for vector, sentence in zip(got, SENTENCES, strict=True):
        whole = reference.run(text_inputs(text, manifest, sentence, "input"))[manifest.outputs[0].name]
        assert np.abs(vector - pool(whole, manifest)).max() < 1e-5
    assert np.allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)
    near, far = got[0] @ got[1], got[0] @ got[2]
    assert near > far + 0.3, "a paraphrase is nearer than an unrelated sentence"


@pytest.mark.asyncio(loop_scope="module")
async def test_fifteen_lines_of_nats_py_stream_a_completion_and_get_an_embedding(cluster: LocalCluster) -> None:
    """As they stand: nats-py alone is enough for text and vectors."""
    code = [line for line in SCRIPT.read_text().splitlines() if line.strip() and not line.startswith(('"""', "import"))]
    assert len(code) <= 15
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        SCRIPT,
        cluster.url,
        "client",
        cwd=cluster.client_keys,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    completion, embedding = out.decode().split("\n")[:2]
    assert completion == "3261|1623"
    assert len(embedding.strip(" []").split(",")) == 4

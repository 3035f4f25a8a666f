"""Models and one cluster that every test of requests shares."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from models.store import Store
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


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """Three agents that serve the decoder over three stages, the embedder and the CNN over two each."""
    async with serving(tmp_path_factory.mktemp("shared") / "cluster", zoo_store, oracle) as running:
        await running.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        await running.deploy(EMBED, "embedder", stages=2)
        await running.deploy(CNN, "cnn", stages=2)
        yield running
        running.alive()

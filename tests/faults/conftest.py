"""A cluster for the tests to break; each leaves it whole and answering."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from models.store import Store
from tests.integration.cluster_fixtures import CHAT, N0, N1, N2, SETTINGS, Oracle, Serving, cached_store, serving
from tests.integration.cluster_fixtures import three_stages as three


@pytest.fixture(scope="session")
def zoo_store(pytestconfig: pytest.Config) -> Store:
    """A store with a tiny decoder `llama`, an `embedder` and a `cnn`."""
    return cached_store(pytestconfig)


@pytest.fixture(scope="session")
def oracle(zoo_store: Store) -> Oracle:
    """The same models, unsplit."""
    return Oracle(zoo_store)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def breakable(
    tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle
) -> AsyncIterator[Serving]:
    """Three agents for one module; what is deployed on them, each test says.

    A cluster that idles through the rest of a run costs it more than starting another does.
    """
    async with serving(tmp_path_factory.mktemp("breakable") / "cluster", zoo_store, oracle) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def chat(breakable: Serving) -> AsyncIterator[Serving]:
    """The decoder over three stages, n0 its ingress; whole again and answering afterwards."""
    await breakable.deploy(CHAT, "llama", placement=three(N0, N1, N2), settings=SETTINGS)
    await breakable.answers()
    yield breakable
    breakable.alive()
    await breakable.until_answering()


@pytest_asyncio.fixture(loop_scope="session")
async def spared(breakable: Serving) -> AsyncIterator[Serving]:
    """The decoder over two of three nodes, whichever the planner wants; all of them again afterwards."""
    await breakable.deploy(CHAT, "llama", stages=2, settings=SETTINGS)
    await breakable.until(lambda found: not found.draining and found.candidate is None)
    await breakable.answers()
    yield breakable
    breakable.alive()
    await breakable.until_answering()

"""One recording of a real cluster for everything here that needs what such a one says."""

import asyncio

import pytest

from tests.security.recording import Recording, record


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """What the processes of a cluster signed and said, from a deployment's wish to its end."""
    with asyncio.Runner() as runner:
        return runner.run(record(tmp_path_factory.mktemp("recording")))

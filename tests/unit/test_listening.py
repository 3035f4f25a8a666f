"""An address at which an agent cannot listen is told as such, in one line."""

import socket
from pathlib import Path

import pytest

from agent.links import LinkServer
from bus.identity import load_identity
from bus.together import make_members
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

N0 = NodeId("n0")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listening")
    make_members(folder, [N0])
    return folder / N0


@pytest.mark.parametrize("listen", ["nowhere", ":7410", "127.0.0.1:port", "127.0.0.1:70000", "192.0.2.1:0", "taken"])
async def test_an_address_that_cannot_be_is_refused(keys: Path, listen: str) -> None:
    server = LinkServer(load_identity(keys, N0), lambda *_: None, lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}" if listen == "taken" else listen
        with pytest.raises(ResplitError, match="give an address of this machine") as caught:
            await server.start(where)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "listen")

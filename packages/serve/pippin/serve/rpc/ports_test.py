import pathlib
import socket
import tempfile

import pytest

from pippin.core.errors import ConfigError
from pippin.serve.callers import Identities
from pippin.serve.rpc.auth import Authenticator
from pippin.serve.rpc.guard import Guard
from pippin.serve.rpc.ports import open_port


@pytest.fixture
def socket_folder():
    """A folder whose path is short enough for sockets, as a sandbox's are not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield pathlib.Path(folder)


async def test_a_socket_that_a_dead_server_left_is_replaced_and_one_in_use_is_not(socket_folder):
    path, guard = socket_folder / "s", Guard(Authenticator(Identities(None)), 1.0)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    server, _ = open_port(f"unix:{path}", [], guard)
    await server.start()
    with pytest.raises(ConfigError, match="another process"):
        open_port(f"unix:{path}", [], guard)
    await server.stop(0)
    with pytest.raises(ConfigError, match="folder"):
        open_port(f"unix:{socket_folder}/none/s", [], guard)

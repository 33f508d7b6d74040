import socket

import pytest

from pippin.core.errors import ConfigError
from pippin.serve.addresses import is_local, require_free


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.8.8.8:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/tmp/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
    ],
)
def test_what_only_this_machine_reaches_is_local(address, local):
    assert is_local(address) is local


def test_an_address_that_is_taken_is_refused():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match="another process has it"),
    ):
        require_free(f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("address", ["192.0.2.1:5000", "no-such-host.invalid:5000", "127.0.0.1:x", "5000"])
def test_an_address_that_is_none_of_this_machine_is_refused(address):
    with pytest.raises(ConfigError, match="no address of this machine"):
        require_free(address)

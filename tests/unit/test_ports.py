"""agent.network.ports."""

import socket

import pytest

from agent.network.ports import any_is_free


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_6_15_a_range_of_ports_that_all_are_in_use(address: str) -> None:
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as taken:
        port = taken.getsockname()[1]
        assert not any_is_free(port, port)
    assert any_is_free(port, port)

"""agent.network.ports."""

import socket

from agent.network.ports import any_is_free


def test_6_15_a_range_of_ports_that_all_are_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not any_is_free(port, port)
    assert any_is_free(port, port)

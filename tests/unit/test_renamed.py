"""A host whose name was changed while others know it by the old one: issue 6, line 1."""

import pytest

from agent.main import check_name
from agent.runtime.configuration import ConfigError
from agent.runtime.errors import Reason
from drover.agent.v1 import handshake_pb2 as pb
from tests.unit.asking import REF, confirm, fails, reserve, statement
from tests.unit.test_decisions_read import stopped
from tests.unit.two_agents import Pair


async def test_6_01_a_host_whose_name_was_changed_is_not_dead(pair: Pair) -> None:
    """Its agent has the record of this attempt under another name, so an operator's statement that the old name is dead is wrong."""
    await stopped(pair)
    pair.destination.engine.host.name = "h2b"
    request = confirm(pb.DECISION_GONE, statement=statement("h2"), destination_record=None)
    error = await fails(pair.source.engine.confirm(request), Reason.NOT_IN_DOUBT)
    assert "h2b" in error.message
    assert pair.states == ("performed", "armed")


async def test_6_01_a_record_is_told_under_the_name_that_its_host_had_then(pair: Pair) -> None:
    await pair.destination.engine.reserve_slot(reserve())
    with pytest.raises(ConfigError, match='start the agent as "h2"'):
        check_name("h2b", [pair.destination.durable])
    check_name("h2", [pair.destination.durable])
    pair.destination.engine.host.name = "h2b"
    answer = await pair.destination.engine.get_record(pb.GetRecordRequest(ref=REF))
    assert answer.record.host == "h2"

"""agent.handshake.facts: what a hypervisor's word on a guest means."""

import pytest

from agent.errors import DroverError, Reason
from agent.handshake.facts import check_place_is_free
from agent.hypervisor.base import DomainState
from tests.unit.fake_hypervisor import UUID, guest


def test_6_15_a_stored_definition_of_the_same_guest_may_stay() -> None:
    check_place_is_free(guest(state=DomainState.SHUTOFF), UUID, "web1", "h2")


@pytest.mark.parametrize(
    ("uuid", "name", "state", "words"),
    [
        (UUID, "web1-old", DomainState.SHUTOFF, "virsh undefine web1-old"),
        (UUID, "web1", DomainState.RUNNING, "has its UUID"),
        ("6f1c0f4e-2f0a-4b5e-9d55-0d8f5a1e9b01", "web1", DomainState.SHUTOFF, "another guest"),
    ],
)
def test_6_15_what_is_in_the_place_of_the_guest_is_told_before_a_slot_is_taken(
    uuid: str, name: str, state: DomainState, words: str
) -> None:
    with pytest.raises(DroverError, match=words) as error:
        check_place_is_free(guest(uuid, name, state=state), UUID, "web1", "h2")
    assert error.value.reason is Reason.DOMAIN_EXISTS
    assert "h2 already has" in error.value.message

"""agent.handshake.machines.facts: events from a guest's state, and checks of it."""

from typing import Any

import pytest

from agent.handshake.machines.destination import DestinationEvent
from agent.handshake.machines.facts import check_movable, check_place_is_free, destination_fact, source_fact
from agent.handshake.machines.source import SourceEvent
from agent.hypervisor.base import ENDING, DomainState, Job
from agent.hypervisor.guest_fact import GuestState, fact_of
from agent.runtime.errors import DroverError, Reason
from tests.unit.fake_hypervisor import UUID, guest


def test_6_15_a_stored_definition_of_the_same_guest_may_stay() -> None:
    check_place_is_free(guest(state=DomainState.SHUTOFF), UUID, "web1", "h2")


def test_6_2_a_definition_with_a_memory_that_was_saved_may_not_stay() -> None:
    saved = guest(state=DomainState.SHUTOFF, reason="saved", saved_image=True)
    with pytest.raises(DroverError, match="`virsh managedsave-remove web1`") as error:
        check_place_is_free(saved, UUID, "web1", "h2")
    assert error.value.reason is Reason.DOMAIN_EXISTS
    assert "h2 already has a guest web1" in error.value.message
    with pytest.raises(DroverError, match="another guest"):
        check_place_is_free(saved, "6f1c0f4e-2f0a-4b5e-9d55-0d8f5a1e9b01", "web1", "h2")


@pytest.mark.parametrize(
    ("uuid", "name", "state", "words"),
    [
        (UUID, "web1-old", DomainState.SHUTOFF, "virsh undefine web1-old"),
        (UUID, "web1", DomainState.RUNNING, "has the same UUID"),
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


def test_6_13_a_copy_whose_process_ends_has_not_run_for_that() -> None:
    """While it is being destroyed, or has got a signal, libvirt reports "in shutdown": only its end shows whether it ran."""
    assert destination_fact(guest(state=DomainState.OTHER, reason=ENDING)) is None
    assert destination_fact(guest(state=DomainState.SHUTOFF, reason="destroyed")) is DestinationEvent.SAW_ABSENT
    assert destination_fact(guest(state=DomainState.OTHER, reason="unknown")) is DestinationEvent.SAW_RUNNING, "it sleeps"


def test_6_13_a_guest_whose_process_ends_was_not_stopped_by_its_migration() -> None:
    """Otherwise its source would wait for a decision and then resume a guest that does not exist any more."""
    assert source_fact(guest(state=DomainState.OTHER, reason=ENDING)) is None
    assert source_fact(guest(state=DomainState.SHUTOFF, reason="shutdown")) is SourceEvent.SAW_DEAD


@pytest.mark.parametrize("reason", ["unknown", "migration", "ioerror", "watchdog", "crashing", "save", "dump", "post-copy failed"])
def test_6_32_a_pause_that_is_not_its_users_is_named_and_kept(reason: str) -> None:
    with pytest.raises(DroverError) as error:
        check_movable(guest(state=DomainState.PAUSED, reason=reason), "h1")
    assert error.value.reason is Reason.DOMAIN_NOT_RUNNING
    assert f"paused ({reason})" in error.value.message
    assert "it is still paused there" in error.value.message
    assert "{" not in error.value.message


def test_6_32_a_pause_of_the_user_travels_with_the_guest() -> None:
    check_movable(guest(state=DomainState.PAUSED, reason="user"), "h1")
    check_movable(guest(), "h1")


@pytest.mark.parametrize("changes", [{"job": Job.OUTGOING}, {"job": Job.INCOMING, "incoming": True}])
def test_6_15_a_job_of_somebody_else_is_told_before_the_pause_that_it_makes(changes: dict[str, Any]) -> None:
    with pytest.raises(DroverError) as error:
        check_movable(guest(state=DomainState.PAUSED, reason="migration", **changes), "h1")
    assert error.value.reason is Reason.DOMAIN_BUSY


def test_6_9_a_guest_that_does_not_answer_is_refused_with_that_cause() -> None:
    with pytest.raises(DroverError, match="has not answered for 12 s") as error:
        check_movable(guest(job=Job.UNKNOWN, silent_for=12.3), "h1")
    assert error.value.reason is Reason.DOMAIN_BUSY


def test_6_13_a_copy_that_has_started_runs_though_its_job_has_not_ended() -> None:
    started = guest(state=DomainState.RUNNING, job=Job.INCOMING, incoming=True)
    assert fact_of(started, arriving=True).state is GuestState.RUNNING
    waits = guest(state=DomainState.PAUSED, reason="migration", job=Job.INCOMING, incoming=True)
    assert fact_of(waits, arriving=True).state is GuestState.WAITING
    assert fact_of(waits).state is GuestState.WAITING

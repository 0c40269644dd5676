"""agent.migration.whereabouts: one sentence, and one exit code, from the facts of both hosts."""

from typing import Any

import pytest

from agent.migration.whereabouts import Place, whereabouts
from drover.agent.v1 import handshake_pb2 as hs
from drover.agent.v1 import migration_pb2 as pb

END = {"failed": pb.MIGRATION_STATE_FAILED, "moved": pb.MIGRATION_STATE_SUCCEEDED, "open": pb.MIGRATION_STATE_ACTIVE}
SEEN_AT = hs.GuestFact().see_time.__class__(seconds=3661)


def fact(state: str, reason: str = "", silence: str = "") -> hs.GuestFact:
    return hs.GuestFact(state=hs.GuestState.Value(f"GUEST_STATE_{state.upper()}"), reason=reason, silence=silence, see_time=SEEN_AT)


def migration(end: str, source: hs.GuestFact | None, destination: hs.GuestFact | None, **more: Any) -> pb.Migration:
    return pb.Migration(
        domain_name="vm1",
        source_host="h1",
        destination_host="h2",
        state=END[end],
        source_guest=source,
        destination_guest=destination,
        **more,
    )


RUNS, WAITS, CRASHED, LEFT = fact("running"), fact("waiting", "migration"), fact("crashed", "crashed"), fact("paused", "migration")
GONE = fact("absent")


@pytest.mark.parametrize(
    ("end", "source", "destination", "place", "runs_on", "words"),
    [
        ("open", RUNS, None, Place.SOURCE, "h1", '"vm1" runs on h1'),
        ("open", RUNS, WAITS, Place.SOURCE, "h1", '"vm1" runs on h1'),
        ("open", LEFT, WAITS, Place.UNKNOWN, "", "h1 last reported paused (migration) at 01:01:01 UTC, h2 last reported waiting"),
        ("open", LEFT, RUNS, Place.DESTINATION, "h2", '"vm1" runs on h2'),
        ("open", CRASHED, WAITS, Place.UNKNOWN, "", "it is unknown on which"),
        ("moved", fact("absent", "migrated"), RUNS, Place.DESTINATION, "h2", '"vm1" runs on h2'),
        ("moved", GONE, fact("paused", "user"), Place.DESTINATION, "", '"vm1" is paused (user) on h2'),
        ("moved", GONE, fact("shutoff", "shutdown"), Place.NOWHERE, "", "it is shutoff (shutdown) on h2"),
        ("failed", RUNS, GONE, Place.SOURCE, "h1", '"vm1" runs on h1'),
        ("failed", fact("paused", "user"), GONE, Place.SOURCE, "", '"vm1" is paused (user) on h1'),
        ("failed", LEFT, GONE, Place.SOURCE, "", "to let it run: `virsh resume` on h1"),
        ("failed", CRASHED, GONE, Place.NOWHERE, "", '"vm1" runs nowhere: its QEMU on h1 died; start it again'),
        ("failed", CRASHED, WAITS, Place.NOWHERE, "", "runs nowhere"),
        ("failed", GONE, WAITS, Place.NOWHERE, "", "h1 has no such guest any more"),
        (
            "failed",
            fact("running", silence="no answer"),
            GONE,
            Place.SOURCE,
            "h1",
            "ran on h1 when its hypervisor last answered, at 01:",
        ),
        ("open", fact("paused", "post-copy failed"), WAITS, Place.UNKNOWN, "", "destroy neither copy"),
        ("failed", fact("paused", "post-copy failed"), GONE, Place.NOWHERE, "", "runs nowhere: h2 had a part of its memory"),
    ],
)
def test_6_13_where_a_guest_is_comes_from_the_facts(
    end: str, source: hs.GuestFact, destination: hs.GuestFact | None, place: Place, runs_on: str, words: str
) -> None:
    found = whereabouts(migration(end, source, destination))
    assert (found.place, found.runs_on) == (place, runs_on)
    assert words in found.sentence


def test_6_13_a_copy_that_waits_is_never_a_guest_that_runs() -> None:
    """Whatever the other host reports, and however the migration ended."""
    for end in END:
        for state in hs.GuestState.values():
            found = whereabouts(migration(end, hs.GuestFact(state=state), WAITS))
            assert found.runs_on != "h2"
            assert found.place is not Place.DESTINATION


def test_6_13_only_what_runs_or_is_paused_by_its_user_is_as_usual() -> None:
    assert whereabouts(migration("failed", RUNS, GONE)).usual
    assert whereabouts(migration("failed", fact("paused", "user"), GONE)).usual
    for other in (LEFT, CRASHED, GONE, fact("paused", "I/O error")):
        assert not whereabouts(migration("failed", other, GONE)).usual


def test_6_13_the_word_of_a_host_that_was_declared_dead_does_not_count() -> None:
    assert whereabouts(migration("failed", RUNS, RUNS, statement=hs.Statement(dead_host="h2"))).runs_on == "h1"
    dead_source = whereabouts(migration("failed", RUNS, GONE, statement=hs.Statement(dead_host="h1")))
    assert (dead_source.place, dead_source.runs_on) == (Place.NOWHERE, "")


def test_6_13_a_state_that_this_version_does_not_know_is_carried() -> None:
    found = whereabouts(migration("open", hs.GuestFact(state=99), None))  # type: ignore[arg-type]
    assert found.place is Place.UNKNOWN
    assert "a state that this version does not know" in found.sentence


def test_6_13_an_older_driver_gives_no_facts() -> None:
    assert whereabouts(migration("moved", None, None, runs_on="h2")).sentence == '"vm1" runs on h2'
    assert whereabouts(migration("failed", None, None)).place is Place.NOWHERE

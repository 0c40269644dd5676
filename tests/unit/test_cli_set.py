"""``drover migration set`` and ``Client.update_migration``: what is sent, what is printed."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.client import Client, InvalidRequest, Refused
from tests.unit.fake_server import MIB, FakeMigrations, serve_coordinator
from tests.unit.running_drover import UUID, Drover

SET = ("migration", "set")


@pytest.fixture
async def fake() -> FakeMigrations:
    return FakeMigrations()  # type: ignore[abstract]


@pytest.fixture
async def client(tmp_path: Path, fake: FakeMigrations) -> AsyncIterator[Client]:
    server = await serve_coordinator(f"unix:{tmp_path}/c.sock", fake)
    async with Client(server.addresses[0], timeout=5) as client:
        yield client
    await server.stop(0)


async def test_8_7_the_client_changes_what_is_given_and_returns_what_is_applied(client: Client, fake: FakeMigrations) -> None:
    started = await client.start_migration("long", "b", importance="low", min_bandwidth=MIB, max_downtime=0.5, tenant="gold")
    spec = fake.started[0].spec
    assert (spec.importance, spec.min_bandwidth_bytes_per_second, spec.tenant) == (1, MIB, "gold")
    assert spec.max_downtime.ToMilliseconds() == 500
    changed = await client.update_migration(started.id, bandwidth=3 * MIB + 1, importance="high", max_downtime=0.25)
    assert list(fake.updates[0].update_mask.paths) == ["bandwidth_bytes_per_second", "importance", "max_downtime"]
    assert (changed.bandwidth, changed.applied_bandwidth, changed.importance) == (3 * MIB + 1, 3 * MIB, "high")
    assert (changed.max_downtime, changed.applied_max_downtime) == (0.25, 0.25)
    reset = await client.update_migration(started.id, bandwidth=0, slot_wait=0.0)
    assert list(fake.updates[1].update_mask.paths) == ["bandwidth_bytes_per_second", "slot_wait"]
    assert not fake.updates[1].settings.HasField("slot_wait")
    assert (reset.bandwidth, reset.importance, reset.slot_wait) == (0, "high", None)


async def test_8_7_the_client_refuses_an_unknown_importance(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="low, medium or high"):
        await client.update_migration(UUID, importance="urgent")  # type: ignore[arg-type]


async def test_8_7_one_that_has_ended_is_refused(client: Client) -> None:
    started = await client.migrate("vm1", "b")
    with pytest.raises(Refused) as caught:
        await client.update_migration(started.id, bandwidth=0)
    assert caught.value.reason == "MIGRATION_ENDED"


def test_8_7_set_prints_what_is_applied(drover: Drover) -> None:
    migration_id = drover.json("migrate", "long", "--to", "b", "--detach", "--max-downtime", "300ms", "--min-bandwidth", "1MiB/s")[
        "migration_id"
    ]
    result = drover(
        *SET, migration_id[:8], "--bandwidth", "3.5MiB/s", "--importance", "high", "--max-downtime", "1s", "--wait", "2min"
    )
    shown = [line.split(maxsplit=1)[1] for line in result.stdout.splitlines() if not line.startswith(("longest", "may"))]
    assert shown[2:] == ["high", "3.5 MiB/s, 3 MiB/s applied"]
    assert "1 s, 1 s applied" in result.stdout
    assert "2 min 00 s" in result.stdout
    gone = drover.json(*SET, migration_id, "--bandwidth", "none", "--wait", "none", "--max-downtime", "default")
    settings = gone["settings"]
    assert (settings["importance"], settings["bandwidth_bytes_per_second"]) == ("IMPORTANCE_HIGH", "0")
    assert not {"slot_wait", "max_downtime"} & settings.keys()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "nothing to change"),
        (("--bandwidth", "0"), "out of range"),
        (("--bandwidth", "1MiB/s", "--bandwidth", "none"), "more than once"),
        (("--importance", "urgent"), "low"),
        (("--wait", "-5s"), "not a duration"),
        (("--max-downtime", "2h"), "out of range"),
    ],
)
def test_8_7_a_bad_set_is_a_usage_error(drover: Drover, arguments: tuple[str, ...], text: str) -> None:
    assert text in drover(*SET, UUID, *arguments, code=2).stderr


def test_8_7_set_of_one_that_has_ended_is_refused(drover: Drover) -> None:
    migration_id = drover.json("migrate", "vm1", "--to", "b", "--detach")["migration_id"]
    drover("migration", "watch", migration_id)
    assert "has ended" in drover(*SET, migration_id, "--bandwidth", "none", code=4).stderr

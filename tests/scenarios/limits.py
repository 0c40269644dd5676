"""Issue 8: what an operator sets of hosts and guests while they run lasts, travels with the guest, and says who set it."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agent.runtime.errors import DroverError, Reason
from coordinator.cli.session import whoami
from drover.agent.v1 import host_pb2
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import CRAWL, MIB, Talk, assert_idle, speed_up, state

DEFAULTS = ("--incoming-limit", "default", "--outgoing-limit", "default", "--prepared-limit", "default")


def drover(cluster: Cluster, *arguments: str, server: str | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(cluster.drover(*arguments, server=server), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    return done


def shown(cluster: Cluster, host: str, server: str | None = None) -> Any:
    return json.loads(drover(cluster, "host", "show", host, "-o", "json", server=server).stdout)["host"]


@contextlib.contextmanager
def settings(cluster: Cluster, host: str) -> Iterator[None]:
    """What is changed of the host in the block does not last."""
    try:
        yield
    finally:
        drover(cluster, "host", "set", host, *DEFAULTS)
        drover(cluster, "host", "uncordon", host)


def test_8_1_what_was_set_lasts_over_a_restart_of_the_agent_and_says_who_set_it(cluster: Cluster) -> None:
    with settings(cluster, "h2"):
        before = shown(cluster, "h2")["incoming_limit"]
        drover(cluster, "host", "set", "h2", "--incoming-limit", "5", "--prepared-limit", "2", "--comment", "a storm")
        drover(cluster, "host", "cordon", "h2", "--comment", "new RAM on Friday")
        for restart in (False, True):
            if restart:
                cluster.agents["h2"].restart()
                cluster.wait_known()
            host = shown(cluster, "h2")
            assert (host["incoming_limit"], host["prepared_limit"], host["settings"]["cordoned"]) == (5, 2, True), restart
            assert (host["settings_change"]["changed_by"], host["settings_change"]["comment"]) == (whoami(), "a storm")
            assert (host["cordon_change"]["changed_by"], host["cordon_change"]["comment"]) == (whoami(), "new RAM on Friday")
            assert shown(cluster, "h2", server=cluster.agents["h2"].address) == host
        drover(cluster, "host", "set", "h2", "--incoming-limit", "default")
        host = shown(cluster, "h2")
        assert (host["incoming_limit"], host["prepared_limit"], host["settings"]["cordoned"]) == (before, 2, True)


@pytest.mark.parametrize("limit", ["incoming_limit", "outgoing_limit", "prepared_limit"])
async def test_8_1_a_limit_below_zero_is_refused(cluster: Cluster, limit: str) -> None:
    """By the agent itself: the command line asks it for nothing of that kind."""
    before = shown(cluster, "h2")
    request = host_pb2.UpdateHostRequest(settings=host_pb2.HostSettings(cordoned=True))
    setattr(request.settings, limit, -1)
    request.update_mask.paths[:] = ["cordoned", limit]
    async with Talk(cluster.agents["h2"].address) as talk:
        with pytest.raises(DroverError) as refusal:
            await talk.call(talk.hosts.UpdateHost, request)
    assert (refusal.value.reason, refusal.value.metadata["field"]) == (Reason.INVALID_FIELD, f"settings.{limit}")
    assert shown(cluster, "h2") == before


@pytest.mark.parametrize("server", ["coordinator", "agent"])
async def test_8_2_a_cordoned_host_is_not_chosen_and_may_still_be_named(cluster: Cluster, server: str) -> None:
    guest = cluster.start_guest(f"cordoned-{server}")
    there, back = ((cluster.server,) * 2) if server == "coordinator" else [cluster.agents[host].address for host in ("h1", "h2")]
    with settings(cluster, "h2"):
        drover(cluster, "host", "cordon", "h2")
        async with Talk(there) as talk:
            with pytest.raises(DroverError) as refusal:
                await talk.start(guest.name, "")
            assert refusal.value.reason is Reason.NO_HOST
            assert f"h2: it is cordoned by {whoami()}" in refusal.value.message
            assert cluster.copies(guest.name) == {"h1": "running"}
            assert state(await talk.migrate(guest.name, "h2")) == "succeeded"
    async with Talk(back) as talk:
        ended = await talk.migrate(guest.name, "")  # to h1, as there is no other host
        assert (state(ended), ended.destination_host) == ("succeeded", "h1")
    await assert_idle(cluster)


async def test_8_1_a_limit_of_zero_closes_a_host_and_ends_nothing_that_runs(cluster: Cluster) -> None:
    runs, comes = cluster.start_guest("limits-1"), cluster.start_guest("limits-2")
    with settings(cluster, "h2"):
        async with Talk(cluster.server) as talk:
            running = await talk.start(runs.name, "h2", bandwidth_bytes_per_second=CRAWL)
            await talk.watch(running.migration_id, lambda m: m.phase == "perform")
            said = drover(cluster, "host", "set", "h2", "--incoming-limit", "0").stdout
            assert "1 of 0 slots in use, 0 waiting (closed: no guest can come in)" in said
            with pytest.raises(DroverError) as refusal:
                await talk.start(comes.name, "h2")
            assert refusal.value.reason is Reason.HOST_CLOSED, refusal.value.message
            assert refusal.value.retry_after is None, "closed, not to be tried again"
            await speed_up(talk, running.migration_id)
            assert state(await talk.end(running.migration_id)) == "succeeded"
            assert cluster.copies(comes.name) == {"h1": "running"}
            drover(cluster, "host", "set", "h2", "--incoming-limit", "default")
            assert state(await talk.migrate(comes.name, "h2")) == "succeeded"
    await assert_idle(cluster)


async def test_8_1_a_limit_of_zero_lets_no_guest_leave(cluster: Cluster) -> None:
    guest = cluster.start_guest("limits-out")
    with settings(cluster, "h1"):
        drover(cluster, "host", "set", "h1", "--outgoing-limit", "0")
        async with Talk(cluster.server) as talk:
            with pytest.raises(DroverError) as refusal:
                await talk.start(guest.name, "h2")
            assert refusal.value.reason is Reason.HOST_CLOSED, refusal.value.message
            assert "h1" in refusal.value.message
    assert cluster.copies(guest.name) == {"h1": "running"}
    await assert_idle(cluster)


async def test_8_2_who_holds_a_slot_and_who_waits_is_listed_in_order(cluster: Cluster) -> None:
    first, second = cluster.start_guest("queue-1"), cluster.start_guest("queue-2")
    async with Talk(cluster.server) as talk:
        running = await talk.start(first.name, "h2", bandwidth_bytes_per_second=CRAWL)
        await talk.watch(running.migration_id, lambda m: m.phase == "perform")
        waits = await talk.start(second.name, "h2", slot_wait=120)
        await talk.watch(waits.migration_id, lambda m: m.wait.position == 1 and m.wait.host == "h2" and m.phase == "perform")
        for server in (None, cluster.agents["h2"].address):
            slots = json.loads(drover(cluster, "host", "slots", "h2", "-o", "json", server=server).stdout)["slots"]
            incoming = [slot for slot in slots if slot["direction"] == "SLOT_DIRECTION_INCOMING"]
            told = [(slot["migration_id"], slot["kind"].removeprefix("SLOT_KIND_"), slot["position"]) for slot in incoming]
            assert told == [
                (running.migration_id, "TRANSFERRING", 0),
                (waits.migration_id, "PREPARED", 0),
                (waits.migration_id, "TRANSFERRING", 1),
            ]
            assert [slot["peer_host"] for slot in incoming] == ["h1", "h1", "h1"]
            assert "age" in incoming[0]
        end = time.monotonic() + 10
        while shown(cluster, "h2").get("incoming_queue") != 1:  # the coordinator hears of it by its watch
            assert time.monotonic() < end
        assert cluster.running_on(first.name) == ["h1"], "it still transfers"
        for migration in (waits, running):
            await talk.cancel(migration.migration_id)
            assert state(await talk.end(migration.migration_id)) == "cancelled"
    await assert_idle(cluster)


@pytest.mark.parametrize("server", ["coordinator", "agent"])
async def test_8_4_settings_of_a_guest_are_written_and_travel_with_it(cluster: Cluster, server: str) -> None:
    guest = cluster.start_guest(f"settings-{server}")
    address = cluster.server if server == "coordinator" else cluster.agents["h1"].address

    def kept() -> Any:
        return json.loads(drover(cluster, "domain", "show", guest.name, "--host", place, "-o", "json").stdout)["domains"][0][
            "domain"
        ]

    place = "h1"
    assert "settings" not in kept()
    said = drover(cluster, "domain", "set", guest.name, "--tenant", "blue", "--max-bandwidth", "200MiB/s", server=address).stdout
    assert "at most 200 MiB/s" in said
    refused = drover(cluster, "domain", "set", guest.name, "--min-bandwidth", "300MiB/s", server=address, code=4).stderr
    assert "Nothing was changed" in refused
    drover(cluster, "domain", "set", "no-such-guest", "--tenant", "blue", server=address, code=4)
    expected = {"tenant": "blue", "min_bandwidth_bytes_per_second": "0", "max_bandwidth_bytes_per_second": str(200 * MIB)}
    assert kept()["settings"] == expected
    async with Talk(cluster.server) as talk:
        ended = await talk.migrate(guest.name, "h2")
        assert state(ended) == "succeeded"
        assert ended.settings.bandwidth_bytes_per_second == 200 * MIB
    place = "h2"
    assert kept()["settings"] == expected
    drover(cluster, "domain", "set", guest.name, "--tenant", "none", "--max-bandwidth", "none")
    assert "settings" not in kept() or kept()["settings"]["tenant"] == ""
    await assert_idle(cluster)

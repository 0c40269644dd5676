"""Networks of the cluster, by the command line and by migrations. Each scenario takes its networks away again."""

import json
import re
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agent.runtime.errors import DroverError, Reason
from tests.kit.cluster import Cluster
from tests.scenarios.conversation import Talk, state
from tests.transcript import ROOT


def network(cluster: Cluster, *arguments: str, code: int = 0) -> Any:
    """Run ``drover network`` and return its JSON; for exit code 4, the error's reason; for a wrong usage, its text."""
    command = cluster.drover("network", *arguments, "-o", "json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stdout + done.stderr
    if code == 2:
        return done.stderr
    return json.loads(done.stdout) if code == 0 else json.loads(done.stderr)["error"]["reason"]


def text(cluster: Cluster, *arguments: str) -> str:
    return subprocess.run(cluster.drover(*arguments), capture_output=True, text=True, timeout=30, check=True).stdout


def ranges(cluster: Cluster) -> dict[str, str]:
    """Return a range of each network of the cluster's hosts."""
    first = 127 if cluster.kind == "sim" else 10
    second = {"mgmt": 90, "mig1": 91, "mig2": 92} if cluster.kind == "sim" else {"mgmt": 91, "mig1": 92, "mig2": 93}
    return {name: f"{first}.{number}.0.0/24" for name, number in second.items()}


@pytest.fixture(name="clean")
async def without_networks(cluster: Cluster) -> AsyncIterator[None]:
    yield
    for each in network(cluster, "list")["networks"]:
        network(cluster, "remove", each["name"])


@pytest.mark.timeout(150)  # fifteen commands
@pytest.mark.usefixtures("clean")
async def test_8_4_bad_input_has_its_error_and_changes_nothing(cluster: Cluster) -> None:
    cidr = ranges(cluster)
    network(cluster, "add", "mig1", "--cidr", cidr["mig1"], "--migration", "--max-bandwidth", "50MB/s")
    before = network(cluster, "list")
    for reason, *arguments in (
        ("NETWORK_EXISTS", "add", "mig1", "--cidr", "10.200.0.0/24"),
        ("NETWORK_OVERLAPS", "add", "new", "--cidr", cidr["mig1"]),
        ("NETWORK_NOT_FOUND", "show", "new"),
        ("NETWORK_NOT_FOUND", "revoke", "new"),
        ("ROLE_ALREADY_GRANTED", "grant", "mig1"),
        ("INVALID_FIELD", "add", "new", "--cidr", "mig1"),
        ("INVALID_FIELD", "set", "mig1", "--cap", "40MB/s"),
    ):
        assert network(cluster, *arguments, code=4) == reason, arguments
    for usage in (("set", "mig1"), ("add", "new")):
        assert "Error: " in network(cluster, *usage, code=2)
    assert network(cluster, "list") == before
    network(cluster, "revoke", "mig1")
    assert network(cluster, "revoke", "mig1", code=4) == "ROLE_NOT_GRANTED"
    assert not network(cluster, "show", "mig1")["network"]["migration_role"]


@pytest.mark.usefixtures("clean")
async def test_8_5_a_tenants_guest_uses_only_its_own(cluster: Cluster) -> None:
    cidr = ranges(cluster)
    network(cluster, "add", "mig1", "--cidr", cidr["mig1"], "--migration")
    network(cluster, "add", "mig2", "--cidr", cidr["mig2"], "--migration", "--tenant", "acme")
    guest = cluster.guest("of-a-tenant")
    async with Talk(cluster.server) as talk:
        owned = await talk.migrate(guest.name, "h2", tenant="acme")
        assert (state(owned), owned.network, owned.tenant) == ("succeeded", "mig2", "acme")
        assert [(ruled.name, ruled.why) for ruled in owned.network_choice.ruled_out if ruled.name == "mig1"] == [
            ("mig1", "tenant acme has networks of its own")
        ]
        with pytest.raises(DroverError) as error:
            await talk.start(guest.name, "h1", tenant="blue", network="mig2")
        assert error.value.reason is Reason.NETWORK_FORBIDDEN
        other = await talk.migrate(guest.name, "h1", tenant="blue")
        assert (state(other), other.network) == ("succeeded", "mig1")
    assert cluster.running_on(guest.name) == ["h1"]


@pytest.mark.usefixtures("clean")
async def test_8_5_the_users_word_and_what_was_ruled_out(cluster: Cluster) -> None:
    cidr = ranges(cluster)
    for name in ("mig1", "mig2"):
        network(cluster, "add", name, "--cidr", cidr[name], "--migration")
    guest = cluster.guest("of-a-tenant")
    async with Talk(cluster.server) as talk:
        named = await talk.migrate(guest.name, "h2", network="mig2")
        assert (state(named), named.network, named.network_choice.why) == ("succeeded", "mig2", "it was named")
        assert named.uri.startswith(f"tcp://{named.network_choice.destination_address}:")
        managed = await talk.migrate(guest.name, "h1", network="mgmt")
        assert (state(managed), managed.network) == ("succeeded", "mgmt")
        assert any("has no migration role" in warning for warning in managed.warnings)
    shown = text(cluster, "migration", "show", named.migration_id)
    assert "it was named" in shown
    assert f"{named.network_choice.source_address} to {named.network_choice.destination_address}" in shown


@pytest.mark.usefixtures("clean")
async def test_8_5_the_fallback_carries_it_with_a_warning_or_it_is_refused(cluster: Cluster) -> None:
    for name, cidr in ranges(cluster).items():
        network(cluster, "add", name, "--cidr", cidr)
    guest = cluster.guest("of-a-tenant")
    async with Talk(cluster.server) as talk:
        with pytest.raises(DroverError, match="mig1: it does not have the migration role") as error:
            await talk.start(guest.name, "h2")
        assert error.value.reason is Reason.NETWORK_NOT_FOUND
        network(cluster, "set", "mgmt", "--fallback")
        carried = await talk.migrate(guest.name, "h2")
        assert (state(carried), carried.network) == ("succeeded", "mgmt")
        assert any("its rules make it the fallback" in warning for warning in carried.warnings)
        network(cluster, "grant", "mig2")
        again = await talk.migrate(guest.name, "h1")
        assert (state(again), again.network) == ("succeeded", "mig2")
        assert not any("fallback" in warning for warning in again.warnings)


@pytest.mark.timeout(150)
@pytest.mark.usefixtures("clean")
async def test_8_4_the_worked_example_of_the_documentation(cluster: Cluster) -> None:
    """Its ranges are those of real hosts: simulated ones have others."""
    section = (ROOT / "docs/operations.md").read_text().split("## Which network a migration takes")[1].split("\n## ")[0]
    commands = re.findall(r"^    drover (.+)$", section, re.M)
    assert len(commands) == 11
    cidr = ranges(cluster)
    real = {"10.91.0.0/24": cidr["mgmt"], "10.92.0.0/24": cidr["mig1"], "10.93.0.0/24": cidr["mig2"]}
    guest = cluster.guest("db1")
    for command in commands:
        text(cluster, *(real.get(word, word) for word in command.split()))
    async with Talk(cluster.server) as talk:
        moved = next(m for m in (await talk.list()).migrations if m.domain_name == guest.name)
    assert (state(moved), moved.network, moved.tenant) == ("succeeded", "acme", "acme")
    assert cluster.running_on(guest.name) == ["h2"]

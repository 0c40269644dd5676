"""agent.network.choice: which network carries a guest's memory, why, and what was ruled out."""

from typing import Any

import pytest

from agent.network.choice import Choice, Wish, choose
from agent.runtime.errors import DroverError, Reason
from drover.agent.v1 import host_pb2
from drover.agent.v1 import migration_pb2 as pb

LINE = 50_000_000


def side(
    name: str, number: int, host: int, *, role: bool = True, down: bool = False, line: int = LINE, six: bool = False, **rules: Any
) -> host_pb2.Network:
    address = f"fd00:{number}::{host}" if six else f"10.{number}.0.{host}"
    roles = ["migration"] if role else []
    return host_pb2.Network(
        name=name, address=address, roles=roles, down=down, line_bytes_per_second=line, rules=host_pb2.NetworkRules(**rules)
    )


def host(number: int, *networks: host_pb2.Network) -> host_pb2.Host:
    return host_pb2.Host(name=f"h{number}", networks=networks)


def both(*rows: tuple[str, int, dict[str, Any]]) -> tuple[host_pb2.Host, host_pb2.Host]:
    """Return two hosts that have the same networks."""
    made = [host(h, *(side(name, number, h, **fields) for name, number, fields in rows)) for h in (1, 2)]
    return made[0], made[1]


def use(network: str, source: str, destination: str, limit: int = 0) -> pb.Migration:
    """Another migration; without a limit it wants the whole line."""
    settings = pb.MigrationSettings(bandwidth_bytes_per_second=limit)
    choice = pb.NetworkChoice(network=network)
    return pb.Migration(source_host=source, destination_host=destination, network_choice=choice, settings=settings)


TWO = both(("a", 92, {}), ("b", 93, {}), ("mgmt", 91, {"role": False}))


def refused(reason: Reason, wish: Wish, *hosts: host_pb2.Host, defined: tuple[host_pb2.Network, ...] = ()) -> DroverError:
    with pytest.raises(DroverError) as error:
        choose(wish, hosts[0], hosts[1], defined)
    assert error.value.reason is reason
    return error.value


def out(choice: Choice) -> dict[str, str]:
    return {ruled.name: ruled.why for ruled in choice.message.ruled_out}


def test_8_5_the_most_free_capacity_wins_and_the_rest_is_told() -> None:
    uses = [use("a", "h1", "h9", 30_000_000), use("b", "h9", "h2", 10_000_000), use("b", "h9", "h3")]
    choice = choose(Wish(), *TWO, others=uses)
    message = choice.message
    assert (message.network, message.source_address, message.destination_address) == ("b", "10.93.0.1", "10.93.0.2")
    assert message.why == "most free capacity: 38.1 MiB/s of 47.7 MiB/s"
    assert out(choice) == {
        "a": "it has less free capacity: 19.1 MiB/s of 47.7 MiB/s",
        "mgmt": "it does not have the migration role",
    }
    assert choice.warnings == ()


def test_8_5_with_equal_capacity_the_name_decides_and_then_what_was_chosen_counts() -> None:
    uses: list[pb.Migration] = []
    chosen = []
    for _ in range(6):
        choice = choose(Wish(), *TWO, others=uses)
        chosen.append(choice.message.network)
        uses.append(use(choice.message.network, "h1", "h2"))
    assert chosen == ["a", "b", "a", "b", "a", "b"]


def test_8_5_the_cap_counts_all_hosts_and_the_maximum_bounds_what_one_can_get() -> None:
    hosts = both(("a", 92, {"cap_bytes_per_second": 40_000_000}), ("b", 93, {"line": 30_000_000}))
    assert choose(Wish(), *hosts).message.network == "a"
    assert choose(Wish(), *hosts, others=[use("a", "h7", "h8", 20_000_000)]).message.network == "b"
    hosts = both(("a", 92, {"max_bytes_per_second": 20_000_000}), ("b", 93, {"line": 30_000_000}))
    assert choose(Wish(), *hosts).message.network == "b"


def test_8_5_the_rules_capacity_goes_before_the_line_and_an_unknown_line_is_no_obstacle() -> None:
    hosts = both(("a", 92, {"line": 10**9, "capacity_bytes_per_second": 10_000_000}), ("b", 93, {}), ("c", 94, {"line": 0}))
    assert choose(Wish(), *hosts).message.network == "c"
    assert out(choose(Wish(), *hosts))["a"] == "it has less free capacity: 9.54 MiB/s of 9.54 MiB/s"


def test_8_5_a_tenants_guest_uses_only_its_own_and_nobody_else_does() -> None:
    hosts = both(("a", 92, {}), ("acme", 93, {"tenants": ["acme"]}), ("blue", 94, {"tenants": ["blue"]}))
    own = choose(Wish(tenant="acme"), *hosts, others=[use("acme", "h1", "h9")] * 5)
    assert own.message.network == "acme"
    assert out(own) == {"a": "tenant acme has networks of its own", "blue": "it is for the tenants blue"}
    for tenant in ("", "white"):
        assert choose(Wish(tenant=tenant), *hosts).message.network == "a"
    gone = host(2, *(network for network in hosts[1].networks if network.name != "acme"))
    error = refused(Reason.NETWORK_NOT_FOUND, Wish(tenant="acme"), hosts[0], gone)
    assert "acme: h2 has no address on it" in error.message
    assert error.metadata["wait"] == "network"


def test_8_5_a_tenants_network_that_neither_host_has_still_keeps_its_guests_off_the_others() -> None:
    defined = host_pb2.Network(name="acme", roles=["migration"], rules=host_pb2.NetworkRules(tenants=["acme"]))
    error = refused(Reason.NETWORK_NOT_FOUND, Wish(tenant="acme"), *TWO, defined=(defined,))
    assert "acme: h1 has no address on it" in error.message
    assert "a: tenant acme has networks of its own" in error.message


def test_8_5_a_network_down_at_one_end_is_not_chosen() -> None:
    source = host(1, side("a", 92, 1), side("b", 93, 1))
    destination = host(2, side("a", 92, 2, down=True), side("b", 93, 2))
    choice = choose(Wish(), source, destination, others=[use("b", "h1", "h9")] * 5)
    assert (choice.message.network, out(choice)) == ("b", {"a": "it is down on h2"})
    error = refused(Reason.NETWORK_NOT_FOUND, Wish(named="a"), source, destination)
    assert "it is down on h2" in error.message
    assert error.metadata["wait"] == "network"
    assert "wait" not in refused(Reason.NETWORK_NOT_FOUND, Wish(named="storage"), source, destination).metadata


def test_8_5_both_hosts_must_have_addresses_of_one_family() -> None:
    source = host(1, side("a", 92, 1), side("a", 92, 1, six=True), side("b", 93, 1))
    destination = host(2, side("a", 92, 2, six=True), side("b", 93, 2, six=True))
    choice = choose(Wish(), source, destination)
    assert (choice.message.source_address, choice.message.destination_address) == ("fd00:92::1", "fd00:92::2")
    assert out(choice) == {"b": "h1 and h2 have no addresses of one family on it"}
    refused(Reason.NETWORK_NOT_FOUND, Wish(named="b"), source, destination)


def test_8_5_the_user_may_name_any_network_with_a_warning_where_it_has_no_role() -> None:
    choice = choose(Wish(named="mgmt"), *TWO)
    assert (choice.message.network, choice.message.why) == ("mgmt", "it was named")
    assert "network mgmt has no migration role" in choice.warnings[0]
    assert choose(Wish(named="b"), *TWO).warnings == ()


def test_8_5_a_named_network_that_does_not_admit_the_tenant_is_forbidden() -> None:
    hosts = both(("a", 92, {}), ("acme", 93, {"tenants": ["acme"]}))
    assert choose(Wish(named="acme", tenant="acme"), *hosts).message.network == "acme"
    assert choose(Wish(named="a", tenant="acme"), *hosts).message.network == "a"
    for tenant in ("", "blue"):
        assert "acme" in refused(Reason.NETWORK_FORBIDDEN, Wish(named="acme", tenant=tenant), *hosts).message


def test_8_5_without_a_migration_network_the_fallback_carries_it_with_a_warning_or_it_is_refused() -> None:
    mgmt = ("mgmt", 91, {"role": False})
    error = refused(Reason.NETWORK_NOT_FOUND, Wish(), *both(mgmt))
    assert "mgmt: it does not have the migration role" in error.message
    assert "wait" not in error.metadata
    fallback = ("mgmt", 91, {"role": False, "fallback": True})
    choice = choose(Wish(), *both(("a", 92, {"down": True}), fallback))
    assert choice.message.network == "mgmt"
    assert choice.message.why == "it is the fallback, and no other can carry it"
    assert "a: it is down on h1 and h2" in choice.warnings[0]
    assert choose(Wish(), *both(("a", 92, {}), fallback)).message.network == "a"
    refused(Reason.NETWORK_NOT_FOUND, Wish(tenant="acme"), *both(("acme", 92, {"down": True, "tenants": ["acme"]}), fallback))


def test_8_5_a_fallback_that_is_down_is_waited_for() -> None:
    error = refused(Reason.NETWORK_NOT_FOUND, Wish(), *both(("mgmt", 91, {"role": False, "fallback": True, "down": True})))
    assert error.metadata["wait"] == "network"


def test_8_5_a_minimum_that_a_network_cannot_give_rules_it_out() -> None:
    hosts = both(("a", 92, {}), ("b", 93, {"max_bytes_per_second": 9_000_000}))
    choice = choose(Wish(minimum=20_000_000), *hosts, others=[use("a", "h1", "h9")] * 5)
    assert choice.message.network == "a"
    assert out(choice) == {"b": "the guaranteed minimum of 19.1 MiB/s is more than the 8.58 MiB/s that it can give"}
    error = refused(Reason.BANDWIDTH_INSUFFICIENT, Wish(minimum=60_000_000), *hosts)
    assert "57.2 MiB/s is more than the 47.7 MiB/s" in error.message
    refused(Reason.BANDWIDTH_INSUFFICIENT, Wish(named="b", minimum=20_000_000), *hosts)


def test_8_5_a_role_on_one_side_only_is_not_enough() -> None:
    source = host(1, side("a", 92, 1, role=False), side("b", 93, 1))
    assert choose(Wish(), source, TWO[1]).message.network == "b"


def test_8_5_no_network_at_all_says_what_each_host_has() -> None:
    error = refused(Reason.NETWORK_NOT_FOUND, Wish(), host(1), host(2, side("a", 92, 2)))
    for part in ("the source has none", "the destination has a (migration)", "a: h1 has no address on it"):
        assert part in error.message


def test_8_4_a_network_that_is_drained_takes_no_migration_not_even_one_that_names_it() -> None:
    hosts = both(("a", 92, {}), ("b", 93, {"fallback": True}))
    drained = host_pb2.Network(name="b", roles=["draining"], rules=host_pb2.NetworkRules(fallback=True))
    error = refused(Reason.NETWORK_FORBIDDEN, Wish("b"), *hosts, defined=(drained,))
    assert "network b is being drained" in error.message
    assert choose(Wish(), *hosts, (drained,)).message.network == "a"
    only = both(("b", 93, {"fallback": True}))
    assert "it is being drained" in refused(Reason.NETWORK_NOT_FOUND, Wish(), *only, defined=(drained,)).message

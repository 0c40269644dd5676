"""The client's methods for hosts and their guests. What they need is imported at their first use: a migration starts sooner."""

import importlib
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import grpc.aio

    from coordinator.client.host_types import Domain, DomainList, Host, Slot
    from coordinator.client.hosts import HostQuestions

Limit = int | Literal["default"]
"""A limit: a number of slots, or "default" for that of the host's configuration file."""


class HostCalls:
    """Part of `Client`."""

    address: str
    timeout: float
    _call: Any
    _host_questions: "HostQuestions | None" = None

    @property
    def _open(self) -> "grpc.aio.Channel":
        raise NotImplementedError

    async def list_hosts(self) -> "list[Host]":
        """Return every host of the cluster, by name; an agent knows only its own."""
        return await self._questions.list_hosts()

    async def get_host(self, name: str) -> "Host":
        """Return the host. Raises `NotFound`."""
        return await self._questions.get_host(name)

    async def remove_host(self, name: str) -> None:
        """Forget a host that does not answer. Raises `NotFound`, `Refused`."""
        await self._questions.remove_host(name)

    async def update_host(
        self,
        name: str,
        *,
        changed_by: str,
        comment: str = "",
        incoming_limit: Limit | None = None,
        outgoing_limit: Limit | None = None,
        prepared_limit: Limit | None = None,
        cordoned: bool | None = None,
    ) -> "Host":
        """Change settings of a host, durably; None leaves one as it is. Return the host as it is then.

        `incoming_limit`, `outgoing_limit`: most transfers at once, in units of cost; 0 closes the host for that direction. What is
        above a lowered limit goes on to its end. `prepared_limit`: most migrations in each direction that are prepared beside those.
        `cordoned`: not chosen for a migration to any host. `changed_by`: who does it, such as "root@admin1", for the record.

        Raises `NotFound`, `InvalidRequest`, `Unreachable`, `Refused`.
        """
        limits = {"incoming_limit": incoming_limit, "outgoing_limit": outgoing_limit, "prepared_limit": prepared_limit}
        changes = {name: value for name, value in {**limits, "cordoned": cordoned}.items() if value is not None}
        return await self._questions.update_host(name, changes, changed_by, comment)

    async def list_slots(self, host: str) -> "list[Slot]":
        """Return the slots of a host that are taken and the migrations that wait for one: incoming before outgoing; of each, those
        that are taken, then the queue in its order. Raises `NotFound`, `Unreachable`.
        """
        return await self._questions.list_slots(host)

    async def list_domains(self, host: str = "") -> "DomainList":
        """Return the guests of one host, or of all (`host` empty); an agent knows only those of its own host."""
        return await self._questions.list_domains(host)

    async def update_domain(
        self,
        domain: str,
        *,
        host: str = "",
        tenant: str | None = None,
        min_bandwidth: int | None = None,
        max_bandwidth: int | None = None,
    ) -> "Domain":
        """Write settings of a guest into its definition, with which they travel; None leaves one as it is, "" or 0 removes it.

        `domain`: name or UUID. `host`: the host that has it; empty: where it is found. `min_bandwidth`: bytes per second that its
        migrations are guaranteed. `max_bandwidth`: most bytes per second of its migrations.

        Raises `NotFound`, `InvalidRequest`, `Unreachable`, `Refused`.
        """
        bandwidths = {"min_bandwidth_bytes_per_second": min_bandwidth, "max_bandwidth_bytes_per_second": max_bandwidth}
        changes = {name: value for name, value in {"tenant": tenant, **bandwidths}.items() if value is not None}
        return await self._questions.update_domain(domain, changes, host)

    @property
    def _questions(self) -> "HostQuestions":
        if self._host_questions is None:
            module = importlib.import_module("coordinator.client.hosts")
            self._host_questions = module.HostQuestions(self._open, self.address, self.timeout, self._call)
        return self._host_questions

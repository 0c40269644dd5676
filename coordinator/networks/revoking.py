"""Takes the migration role of networks that are drained, once no migration uses them; also after a restart."""

from agent.migration.collection import Collection
from agent.runtime.bell import first_of
from agent.runtime.errors import DroverError, Reason
from coordinator.networks.table import NetworkTable
from drover.coordinator.v1 import network_pb2 as pb


async def finish_revoking(table: NetworkTable, migrations: Collection) -> None:
    """Take roles for ever."""
    while True:
        changed = (table.changed.next, migrations.changed.next)
        for network in table.all():
            if network.revoking and not migrations.using(network.name):
                await _finish(table, network.name)
        await first_of(*changed)


async def _finish(table: NetworkTable, name: str) -> None:
    def take(network: pb.Network) -> None:
        if network.revoking:  # else it was granted again meanwhile
            network.migration_role = network.revoking = False

    try:
        await table.change(name, take, "role revoked")
    except DroverError as error:
        if error.reason is not Reason.NETWORK_NOT_FOUND:
            raise  # the store does not answer: supervision tries again

"""The agent of one host. Rooms, each of which imports only itself and those above it (`tests/unit/test_house.py` holds that)::

    runtime     what every daemon needs: errors, log, configuration files, SQLite, supervision
    network     URIs and addresses of the migration network, interfaces, ports
    transfer    arithmetic of a transfer (pure)
    hypervisor  one interface and its drivers, libvirt and sim; conversion to and from the wire
    admission   slots
    handshake   machines (pure), host (records, journal, both sides), drive (who calls the phases)
    migration   a migration as a resource: plan, state, description, take-over, fencing
    service     the gRPC adapter: server, bounds, errors, one adapter for each service, other agents

`main` puts them together; `config` is the agent's file. docs/architecture.md shows one migration on its way through the rooms.
"""

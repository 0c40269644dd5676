"""The cluster's networks: `table` keeps them in the store, `network_service` serves them, and takes roles that are drained.

Begin with `NetworkTable`. Which of a host's interfaces belong to a network is decided in `agent.network.rules`."""

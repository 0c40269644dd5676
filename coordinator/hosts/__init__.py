"""The hosts of the cluster. Begin with `hosts.HostRegistry`.

A registration (`host_service`) is a hint to go and look; `host_link` watches the agent itself, `claims` checks that no other
coordinator has the host, `host_table` and `known_host` keep what is known, and `directory` turns a user's names into hosts.
"""

"""The handshake of one attempt to migrate a guest: Begin, Prepare, Perform, Finish, Confirm, and what ends it when something dies.

`machines` holds the decisions (pure), `host` runs them on a host, `drive` calls the phases of two hosts. Begin with
`machines.destination`: its record is the decision that everything rests on.
"""

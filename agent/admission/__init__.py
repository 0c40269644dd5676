"""Admission: how many guests may come to this host and leave it at once, and who is next. Knows no handshake. Begin with
`desk.Desk`.

`book` decides (pure), `ledger` keeps its books durable and lets what is not renewed expire, `desk` serves calls that take a slot or
wait for one, `settings` has the limits, `wire` converts.
"""

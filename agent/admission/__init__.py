"""Admission: how many guests may come to this host and leave it at once, and who is next. Knows no handshake. Begin with `desk.Desk`.

`book` decides (pure), `desk` waits, keeps places durable and lets slots expire, `settings` has the limits, `wire` converts.
"""

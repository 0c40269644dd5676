"""Admission: how many guests may come to this host and leave it at once, and who is next. Knows no handshake. Begin with
`queue.Queue`.

`book` decides (pure), `queue` serves the calls of one direction and keeps its book durable, `desk` has both queues and the settings,
`store` has the rows, `wire` converts.
"""

"""Drives an attempt: calls the phases on both hosts until it has ended. Begin with `driver`; `view` is what it knows of both.

Used by the coordinator, by an agent peer to peer, and by a source's agent that takes over from a driver that went silent.
"""

"""Scenarios that run unchanged on every hypervisor driver: `tests/sim` and `tests/lab` give them their cluster."""

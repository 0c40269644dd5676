"""Tests of a whole cluster on the simulated hypervisor."""

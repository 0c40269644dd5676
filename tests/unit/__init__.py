"""Tests of one piece each, within this process. `two_agents` has two real engines on a fake hypervisor and a fake wire."""

"""Tests of the libvirt driver on real libvirt, without an agent."""

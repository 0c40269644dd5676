"""Tests on real libvirt and real QEMU, in the test hosts of `tests.kit.lab`. They need root."""

"""Arithmetic of a transfer: pure functions and values, no clock and no I/O. Begin with `model`; `progress` is what is measured."""

"""Arithmetic of transfers: pure functions and values, no clock and no I/O. Begin with `model` for one transfer, with `shares` for
the division of bandwidth among many; `progress` is what is measured."""

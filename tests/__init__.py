"""Tests by what they run on: `unit` (one piece), `model` (every interleaving), `sim` and `lab` (a whole cluster, with `scenarios`).

`kit` makes hosts and clusters, `bench` measures; neither is a test.
"""

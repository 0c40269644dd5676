"""Kits of tests, benches and the demonstration: `lab` makes real test hosts, `cluster` runs Drover on them or on simulated ones."""

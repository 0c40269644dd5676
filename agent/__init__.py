"""The agent of one host: its side of every migration, what it serves, and what its hypervisor is told."""

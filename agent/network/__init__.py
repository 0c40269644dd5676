"""The migration network: URIs and addresses (`uri`), this host's interfaces and ports, and networks that two hosts share.

Decisions are pure; only `interfaces`, `rtnetlink` and `ports` ask the kernel, and `probe` proves a path (`connecting`)."""

"""How the scenarios' clusters are configured: limits that are met soon, also on a busy machine, where a call takes a second."""

SETTINGS = {
    "agent": {"incoming_limit": 1, "lease_seconds": 8, "takeover_after_seconds": 8},
    "coordinator": {},
}

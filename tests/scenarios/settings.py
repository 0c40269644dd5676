"""How the scenarios' clusters are configured: small limits, so that they are met soon."""

SETTINGS = {
    "agent": {"incoming_limit": 1, "lease_seconds": 2, "takeover_after_seconds": 2},
    "coordinator": {},
}

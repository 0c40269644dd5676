"""What every daemon needs, whatever it does. Knows nothing of guests, hosts or migrations but the events that tell of them.

`errors` (every reason and its gRPC code) is the one to begin with; `failure` is an error as a value. `events` is the bus that tells
what changes, `event_log` writes it down. `sqlite` and `intact` keep files, `supervision` keeps background tasks alive, `backoff`
and `breaker` pace what is tried again, `bell` and `alongside` are small asyncio pieces, `wire` converts times and enums.
"""

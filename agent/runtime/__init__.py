"""Parts that every daemon needs. Except for the types of `events`, nothing here knows guests, hosts or migrations.

Begin with `errors` (every reason and its gRPC code); `failure` is an error as a value. `events` is the bus of changes, `event_log`
logs them. `configuration` reads a daemon's file, `config_errors` explains what is wrong in it. `sqlite` and `intact` keep files,
`supervision` restarts background tasks, `backoff` and `breaker` pace retries, `bell` and `alongside` are small asyncio helpers,
`wire` converts times and enums, `units` writes sizes and rates for people."""

"""The gRPC layer: identity and rights of callers, bounds, errors, one adapter per service, and the client of other agents (`peers`).

Adapters convert and call; they hold no rules. Begin with `server` and `interceptor`, through which every call passes."""

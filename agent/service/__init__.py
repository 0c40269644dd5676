"""The gRPC adapter: identity and rights of callers, bounds, errors, one adapter for each service, and the client side towards other
agents (`peers`).

Adapters translate and call; they hold no rules. Begin with `server` and `interceptor`, through which every call passes.
"""

"""The thin gRPC adapter: translate, check, call, translate errors. Handlers hold no rules of their own."""

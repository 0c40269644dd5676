"""The handshake: pure state machines of source, destination and driver, and the code that runs them."""

"""One host's part of the handshake. Begin with `engine`, which serves the calls.

`records` and `journal` are what is durable; `attempt` and `attempts` hold one and all of them; `source_side` and `destination_side`
take calls, `source_effects` and `destination_effects` act on the hypervisor; `peer_record` and `owner` read the other host's record.
"""

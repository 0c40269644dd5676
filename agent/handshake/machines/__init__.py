"""Pure decisions of the handshake: state machines of `source` and `destination`, and `decide`, which picks the driver's next calls.

`facts` turns what a hypervisor reports into events of the machines. No I/O, no clock, no gRPC; `tests/model` explores all of it.
"""

"""An explicit-state model checker for the handshake: every interleaving of faults, within small bounds.

It runs the same tables and the same `decide` as `agent.handshake` in a small world: two agents with a durable record each,
drivers with stale views, messages that are lost, repeated and late, and two hypervisors that behave as experiments showed.
In every state it checks that at most one copy of the guest runs and that nobody has read a decision that is not durable; and
that from every state an end can be reached once the faults stop. A failure is printed as the shortest trace to it.

    python -m tests.model                  the large worlds, each explored completely
    python -m tests.model --list           the names of the worlds
    python -m tests.model two_coordinators --states 500000

How to read it: `world` (what may happen), `parts` (the parts of a state), `agents`, `hosts` and `network` (the rules),
`invariants` (what must hold), `compiled` and `explore` (the search), `trace` (how a failure is shown), `worlds` (which bounds are
explored), `mutations` (deliberate flaws, which it must find), `findings` (what is known not to hold).
"""

"""An explicit-state model checker for the handshake: every interleaving of faults, within small bounds.

It runs the very tables and the very `decide` of `agent.handshake` in a small world: two agents with a durable record each,
drivers with stale views, messages that are lost, repeated and late, and two hypervisors that behave as experiments showed.
In every state it checks that at most one copy of the guest runs and that nobody was told a decision that is not durable; and
that from every state an end can be reached once the faults stop. A failure is printed as the shortest trace to it.

    python -m tests.model                  the large worlds, the whole space of each
    python -m tests.model --list           what there is
    python -m tests.model two_coordinators --states 500000

How to read it: `world` (what may happen), `parts` (what a state is made of), `agents`, `hosts` and `network` (the rules),
`invariants` (what must hold), `compiled` and `explore` (the search), `trace` (how a failure is shown), `worlds` (which bounds are
explored), `mutations` (flaws put in on purpose, which it must find), `findings` (what is known not to hold).
"""

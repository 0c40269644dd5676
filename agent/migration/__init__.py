"""A migration as a resource: it is started, listed, watched, cancelled, resolved, and outlives the process that drives it.

Begin with `migrations`, which starts, cancels and resolves. `collection` holds them all and serves lists and watches, `driving`
takes the slot and drives one to its end, `planning` decides before the first phase, `progress` and `whereabouts` describe,
`takeover` and `fencing` act when a driver or a host is gone.
"""

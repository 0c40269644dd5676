"""Migrations as resources: they are started, listed, watched, cancelled and resolved, and outlive the process that drives them.

Begin with `migrations`, which starts, cancels and resolves. `collection` holds them all and serves lists and watches, `driving`
takes the slot and drives one to its end, `planning` decides before the first phase, `progress` and `whereabouts` describe,
`takeover` and `fencing` act when a driver or a host is lost."""

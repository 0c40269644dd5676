"""A migration as a resource: it is started, listed, watched, cancelled, resolved, and outlives the process that drives it.

Begin with `migrations`. `planning` decides before the first phase, `progress` and `whereabouts` describe, `takeover` and
`fencing` act when a driver or a host is gone.
"""

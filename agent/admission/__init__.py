"""Who may come in: the destination owns its slots."""

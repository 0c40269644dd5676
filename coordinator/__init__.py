"""The cluster on top of the agents.

`hosts` (who is there, and how to call them) and `store` (what is remembered) make the coordinator; `main` puts it together and
drives migrations with `agent.migration`. `client` is the Python client, `cli` the command `drover`.
"""

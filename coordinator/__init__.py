"""The coordinator of a cluster (hosts, the migrations that it drives), the Python client, and the command `drover`."""

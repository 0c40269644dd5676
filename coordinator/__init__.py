"""The coordinator of a cluster (its hosts, and the migrations that it drives), the Python client, and the command `drover`."""

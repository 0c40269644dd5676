"""Prints why this machine cannot have real test hosts, and then exits with 1; for the scripts."""

import sys

from tests.kit.cluster.platforms import why_not_libvirt

if __name__ == "__main__":
    reason = why_not_libvirt()
    print(reason or "this machine can have real test hosts")
    sys.exit(1 if reason else 0)

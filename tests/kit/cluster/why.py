"""Says why real test hosts cannot be made on this machine, and exits with 1 then; for the scripts."""

import sys

from tests.kit.cluster.platforms import why_not_libvirt

if __name__ == "__main__":
    reason = why_not_libvirt()
    print(reason or "they can")
    sys.exit(1 if reason else 0)

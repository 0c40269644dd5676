"""Compiles the test guest and the lab's two small native helpers, once per version of their source.

Products go to a cache folder, under a name with a hash of source and command; so nothing has to be cleaned, and several
labs may build at once (each writes its own temporary file and renames it).
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.kit.lab.processes import run

HERE = Path(__file__).parent
CACHE = Path("/var/cache/drover-lab")
"""Build products and libvirt's capabilities cache. The folder may be removed at any time."""

GUEST_SOURCES = ("guest/guest.ld", "guest/boot.S", "guest/guest.c")
GUEST_FLAGS = (
    # No C library is needed, so 32-bit code can be built without gcc-multilib.
    *("-m32", "-march=i686", "-O2", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pic", "-fno-pie"),
    *("-mgeneral-regs-only", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    *("-Wall", "-Wextra", "-Wl,--build-id=none"),
)
HELPER_FLAGS = ("-O2", "-Wall", "-Wextra")


@cache
def guest_kernel(folder: Path = CACHE) -> Path:
    """Return the test guest: a 32-bit multiboot ELF of some 10 KiB, to be booted by `<kernel>`."""
    script, *code = (HERE / name for name in GUEST_SOURCES)
    return _compiled("guest", (*GUEST_FLAGS, f"-Wl,-T,{script}"), (script, *code), code, folder)


@cache
def helper(name: str, folder: Path = CACHE) -> Path:
    """Return a native helper by its name in `native/`: "init" (a host's process 1) or "stamp" (time stamps for serial logs)."""
    source = HERE / "native" / f"{name}.c"
    return _compiled(name, HELPER_FLAGS, (source,), (source,), folder)


def _compiled(name: str, flags: Sequence[str], read: Sequence[Path], code: Sequence[Path], folder: Path) -> Path:
    """Return the product of gcc on `code`. Runs gcc only if there is no product yet for the present content of `read`."""
    digest = hashlib.sha256(repr(flags).encode() + b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    product = folder / f"{name}-{digest}"
    if product.exists():
        return product
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=folder)
    os.close(handle)
    try:
        run(["gcc", *flags, "-o", temporary, *code], timeout=60)
        os.chmod(temporary, 0o755)
        os.replace(temporary, product)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return product

"""Sizes and rates for people, in messages and on the terminal."""

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Return bytes in binary units, with up to three digits: ``1.5 GiB``."""
    power = 0
    while count >= 1000 and power < len(_SIZES) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {_SIZES[power]}" if power == 0 or count >= 100 else f"{count:.3g} {_SIZES[power]}"


def rate(bytes_per_second: float) -> str:
    """Return a rate in binary units: ``100 MiB/s``."""
    return f"{size(bytes_per_second)}/s"

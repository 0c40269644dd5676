"""Times for people."""


def seconds(value: float) -> str:
    """Return seconds as people write them: ``250 ms``, ``12.3 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"


def eta(low: float | None, high: float | None) -> str:
    """Return the range in which the end is expected, in seconds from now; empty if unknown."""
    if low is None:
        return ""
    if high is None:
        return f"over {seconds(low)}"
    return seconds(high) if high - low < max(0.1 * high, 0.1) else f"{seconds(low)} to {seconds(high)}"


def ago(age: float | None, *, by_wall_clock: bool) -> str:
    """Return `age` (seconds, from the server) as text; empty if the server sent none. "about" if it comes from the server's wall
    clock, which may have been set in between.
    """
    return f"{'about ' if by_wall_clock else ''}{seconds(age)} ago" if age is not None else ""

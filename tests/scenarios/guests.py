"""The guests of the scenarios. Each test has its own, so that tests do not depend on each other."""

from tests.kit.cluster import GuestSpec

GUESTS = {
    spec.name: spec
    for spec in (
        GuestSpec("there-and-back"),
        GuestSpec("starts-with-its-host", autostart=True),
        GuestSpec("left-behind", autostart=True),
        GuestSpec("stays", autostart=True),
        GuestSpec("transient", persistent=False),
        GuestSpec("forgotten"),
        GuestSpec("peer-to-peer"),
        GuestSpec("to-cancel", memory_mib=128, dirty=100),
        GuestSpec("cancelled-at-once"),
        GuestSpec("renamed"),
        GuestSpec("twice"),
        GuestSpec("saved"),
        GuestSpec("busy-1", memory_mib=128),
        GuestSpec("busy-2"),
        *(GuestSpec(f"waited-for-{test}", memory_mib=128) for test in ("coordinator", "agent", "cancel", "kill")),
        *(GuestSpec(f"waits-{test}") for test in ("coordinator", "agent", "cancel", "kill")),
        GuestSpec("cordoned"),
        *(GuestSpec(name, memory_mib=128) for name in ("limits-1", "queue-1")),
        *(GuestSpec(name) for name in ("limits-2", "limits-out", "queue-2", "settings-coordinator", "settings-agent")),
        GuestSpec("by-hand"),
        GuestSpec("leased"),
        GuestSpec("refused"),
        GuestSpec("halted", halted=True),
        GuestSpec("wanted-twice", memory_mib=128),
        GuestSpec("misnamed"),
        GuestSpec("oddly-named"),
        GuestSpec("meant"),
        GuestSpec("hex-1"),
        GuestSpec("hex-2"),
        GuestSpec("to-a-uri"),
        GuestSpec("stopped", running=False),
        GuestSpec("progress", memory_mib=128, dirty=500),
        GuestSpec("watched"),
        GuestSpec("orphaned", memory_mib=128),
        GuestSpec("paused-on-arrival"),
        GuestSpec("counted"),
        GuestSpec("named-network"),
        GuestSpec("listening"),
        GuestSpec("incompatible", memory_mib=16),
        GuestSpec("soak"),
        GuestSpec("web1"),
        GuestSpec("web2"),
        GuestSpec("vm1", memory_mib=256, dirty=100),
    )
}
"""By name."""

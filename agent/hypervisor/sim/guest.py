"""One simulated guest: its definition, its state and its clock.

This module decides nothing about a migration; `sender` and `receiver` do, and call the methods here. The reasons of a state are
those of `virsh domstate --reason`.
"""

import time
from collections.abc import Callable
from typing import Literal

from agent.hypervisor.base import Domain, DomainState, Job, Requirements
from agent.hypervisor.guest_settings import GuestSettings
from agent.hypervisor.sim import serial
from agent.hypervisor.sim.config import Base, Bytes
from agent.hypervisor.sim.definition import Definition, requirements_of
from agent.transfer.model import Load

ACTIVE = (DomainState.RUNNING, DomainState.PAUSED)


class GuestRecord(Base, kw_only=True, frozen=True):
    """A guest in the state file."""

    running: Definition | None
    """None for a guest that is shut off."""
    stored: Definition | None
    """None for a guest that is not persistent."""
    state: Literal["running", "paused", "shutoff"]
    reason: str
    wants_run: bool
    left: bool
    postcopy: bool
    owed: Bytes
    clock: float
    at: float
    """Wall time at which `clock` was read."""
    autostart: bool = False


class Guest:
    """A guest on this host. `notify(guest, kind, detail)` is called after each change.

    `now` is the clock of the event loop, in seconds.
    """

    def __init__(
        self,
        definition: Definition,
        now: Callable[[], float],
        notify: Callable[["Guest", str, str], None],
        *,
        stored: Definition | None = None,
    ) -> None:
        self.definition = definition
        self.stored = stored
        self.autostart = False
        """It starts with its host; only a guest with a stored definition can."""
        self.saved_image = False
        """Its next start restores a memory image that its user has saved."""
        self.state = DomainState.SHUTOFF
        self.reason = "unknown"
        self.wants_run = False
        """Its user wants it to run, even while a migration has stopped it."""
        self.left = False
        """Its whole state was sent away, so another copy may run."""
        self.job = Job.NONE
        self.incoming = False
        self.postcopy = False
        self.has_run = False
        """It has run since it was created here, or arrived."""
        self.silent_since: float | None = None
        """Time since when its process answers nothing; None while it answers."""
        self.owed = 0
        """Bytes that the destination still lacks, when the stream of a post-copy breaks."""
        self._now = now
        self._notify = notify
        self._clock = 0.0
        self._since: float | None = None
        self._logged = 0

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def uuid(self) -> str:
        return self.definition.uuid

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def ticking(self) -> bool:
        """Whether its CPU really runs. A guest that waits for a page that never comes has the state running, but does not tick."""
        return self._since is not None

    @property
    def clock(self) -> float:
        """Seconds for which it has run since it booted, on any host."""
        return self._clock + (self._now() - self._since if self._since is not None else 0.0)

    @property
    def load(self) -> Load:
        """Its memory, and how fast it writes to it now: not at all while it is stopped."""
        it = self.definition.guest
        working_set = it.memory_bytes if it.working_set is None else it.working_set
        return Load(it.memory_bytes, it.dirty_rate if self.ticking else 0, working_set)

    def facts(self) -> Domain:
        it = self.definition.guest
        return Domain(
            name=it.name,
            uuid=self.uuid,
            state=self.state,
            reason=self.reason,
            memory_bytes=it.memory_bytes,
            vcpus=it.vcpus,
            persistent=self.stored is not None,
            job=self.job if self.silent_since is None else Job.UNKNOWN,
            incoming=self.incoming,
            postcopy=self.postcopy,
            silent_for=0.0 if self.silent_since is None else self._now() - self.silent_since,
            saved_image=self.saved_image and not self.active,
            settings=self.settings,
        )

    @property
    def settings(self) -> GuestSettings | None:
        it = self.definition.guest
        written = {"tenant": it.tenant, "min_bandwidth": str(it.min_bandwidth), "max_bandwidth": str(it.max_bandwidth)}
        return GuestSettings.of(written)[0] or None

    def set(self, settings: GuestSettings) -> None:
        """Write its settings into its definitions."""
        fields = {"tenant": settings.tenant, "min_bandwidth": settings.min_bandwidth, "max_bandwidth": settings.max_bandwidth}
        self.definition = self.definition.with_(**fields)
        self.stored = self.stored.with_(**fields) if self.stored is not None else None

    def requirements(self) -> Requirements:
        return requirements_of(self.definition)

    # --- changes of state ---------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start the guest with empty memory and its clock at zero."""
        self._clock, self._since, self._logged = 0.0, None, 0
        self.wants_run, self.saved_image = True, False
        if self.logs:
            line = serial.boot_line(self.definition.guest.memory_bytes)
            serial.write(self.definition.guest.log, [(0, line)], 0.0, time.monotonic())
        self.run("booted", "started")

    def run(self, reason: str, kind: str = "resumed") -> None:
        self.state, self.reason = DomainState.RUNNING, reason
        self.left, self.has_run = False, True
        if self._since is None:
            self._since = self._now()
        self._notify(self, kind, reason)

    def stop(self, reason: str, kind: str = "suspended") -> None:
        self._stand_still()
        self.state, self.reason = DomainState.PAUSED, reason
        self._notify(self, kind, reason)

    def block(self, reason: str) -> None:
        """Stop its clock but keep the state running: it waits for a page that does not come."""
        self._stand_still()
        self.state, self.reason = DomainState.RUNNING, reason
        self._notify(self, "suspended", reason)

    def unblock(self, reason: str) -> None:
        if self.wants_run:
            self.run(reason)
        else:
            self.stop(reason)

    def give_back(self, reason: str) -> None:
        """Bring it back to what its user wants: running, or paused."""
        self.left = self.postcopy = False
        if self.wants_run:
            self.run(reason)
        else:
            self.stop("user")

    def shut_off(self, reason: str) -> None:
        self._stand_still()
        self.state, self.reason = DomainState.SHUTOFF, reason
        self.incoming = self.postcopy = self.left = self.wants_run = False
        self.job, self.owed = Job.NONE, 0
        self.definition = self.stored or self.definition
        self._notify(self, "stopped", reason)

    def send_state(self) -> float:
        """Return the clock, to be sent with the last of the memory. From now on another copy may run."""
        self.left = True
        self._notify(self, "job", "state sent")
        return self._clock

    def take_state(self, clock: float, wants_run: bool) -> None:
        """Take over the clock and `wants_run` from the stream: this copy continues from there."""
        self._clock, self._since = clock, None
        self._logged = serial.ticks(clock)
        self.wants_run = wants_run

    def _stand_still(self) -> None:
        self._clock = self.clock
        self._since = None
        self.flush()

    # --- the serial line ----------------------------------------------------------------------------------------------

    @property
    def logs(self) -> bool:
        return bool(self.definition.guest.log)

    def flush(self) -> None:
        """Write the log lines of all ticks until now."""
        clock = self.clock
        last = serial.ticks(clock)
        if self.logs and last > self._logged:
            it = self.definition.guest
            written = serial.lines(it.memory_bytes, self._logged + 1, last, clock, time.time())
            serial.write(it.log, written, clock, time.monotonic())
        self._logged = last

    # --- the state file -----------------------------------------------------------------------------------------------

    def record(self) -> GuestRecord:
        return GuestRecord(
            running=self.definition if self.active else None,
            stored=self.stored,
            state="running" if self.ticking else "paused" if self.active else "shutoff",
            reason=self.reason,
            wants_run=self.wants_run,
            left=self.left,
            postcopy=self.postcopy,
            owed=self.owed,
            clock=self.clock,
            at=time.time(),
            autostart=self.autostart,
        )

    def revive(self, record: GuestRecord) -> None:
        """Continue after the process died, as real guests do after a restart of libvirtd: a guest that ran has run meanwhile, one
        that a migration had stopped before its state was sent runs again, and a broken post-copy waits to be recovered."""
        ran = record.state == "running"
        self._clock = record.clock + (max(0.0, time.time() - record.at) if ran and not record.postcopy else 0.0)
        self._logged = max(serial.ticks(record.clock), serial.last_number(self.definition.guest.log) if ran else 0)
        self.reason, self.wants_run, self.left = record.reason, record.wants_run, record.left
        self.postcopy, self.owed, self.autostart = record.postcopy, record.owed, record.autostart
        self.state, self.has_run = DomainState(record.state), True
        if record.postcopy and record.left:
            self.stop("post-copy failed")
        elif record.postcopy:
            self.block("post-copy failed")
        elif ran:
            self.run(record.reason)
        elif record.state == "paused" and not record.left and record.reason == "migration":
            self.give_back("migration canceled")

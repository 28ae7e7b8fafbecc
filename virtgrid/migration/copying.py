"""From the first byte to the switchover: one migrate call, watched, held and let go.

The loop reads QEMU's statistics and the connections every few tens of ms and asks two pure
machines what to do: ``virt.switchover`` (how QEMU is held) and ``migration.gate`` (whether to let
go). It acts on their answers and writes down every one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from virtgrid.core.clock import Clock
from virtgrid.core.errors import (
    AbortedError,
    DeadlineError,
    HoldTimeoutError,
    MigrationFailedError,
    NotFoundError,
    PeerUnreachableError,
    VirtgridError,
)
from virtgrid.core.journal import Journal
from virtgrid.core.units import format_duration, format_size
from virtgrid.migration import drain, gate
from virtgrid.migration.drain import Drain, DrainConfig, Spells
from virtgrid.migration.plan import MigrationPlan
from virtgrid.migration.policy import Observation, make_policy
from virtgrid.migration.pulse import Pulse
from virtgrid.migration.watch import Watch
from virtgrid.net.tickle import Tickler
from virtgrid.virt import switchover
from virtgrid.virt.connection import Hypervisor, LibvirtError
from virtgrid.virt.domain import Domain
from virtgrid.virt.jobstats import MigrationStatus, RamStats
from virtgrid.virt.monitor import SWITCHOVER_BANDWIDTH, Monitor, MonitorError

_IDLE_POLL_S: Final = 0.25  # storage phase: nothing is in a hurry
_HOLD_POLL_S: Final = 0.03
_REPORT_EVERY_S: Final = 0.5
_GATE_REPORT_EVERY_S: Final = 0.25
#: How long an aborted or finished migrate call may take to come back.
_RETURN_DEADLINE_S: Final = 45.0
#: After this an aborted call is helped along, or given up when nobody heard the abort.
_UNHEARD_DEADLINE_S: Final = 10.0
#: Monitor errors in a row before the monitor counts as lost.
_MONITOR_ERRORS: Final = 20


class Copy:
    """One migrate call under supervision. ``run()`` returns when the domain has been migrated.

    ``ask_release`` and ``ask_abort`` may be called at any time from the same loop.
    """

    def __init__(
        self,
        plan: MigrationPlan,
        journal: Journal,
        clock: Clock,
        *,
        domain: Domain,
        monitor: Monitor,
        destination: Hypervisor,
        watch: Watch | None,
        rescue: Callable[[], Awaitable[None]],
        peer_silent: Callable[[], Awaitable[bool]],
        letting_go: Callable[[Drain], Awaitable[None]] | None = None,
    ) -> None:
        self._plan = plan
        self._request = plan.request
        self._journal = journal
        self._clock = clock
        self._domain = domain
        self._monitor = monitor
        self._destination = destination
        self._watch = watch
        self._rescue = rescue
        self._peer_silent = peer_silent
        self._letting_go = letting_go
        self._pulse = Pulse(peer_silent)
        self._policy = make_policy(plan.request.policy)
        self._requests, self._spells = 0, Spells()
        self._memory_budget_s = memory_budget_s(plan)
        self._gate = gate.GateConfig.of(plan.request.policy, max_downtime_s=self._memory_budget_s)
        self._hold = switchover.HoldState()
        self._observation: Observation | None = None
        self._hold_config: switchover.HoldConfig | None = None
        tap = plan.facts.tap
        self._tickler = Tickler(tap.tap, tap.mac) if tap and tap.tap and plan.facts.tap_visible else None
        self._phase = ""
        self._began_s = clock.monotonic_s()
        self._release_asked: str | None = None
        self._unheld_asked: str | None = None
        self._ending: VirtgridError | None = None
        self._abort_sent = False
        self._aborted_s: float | None = None
        self._suspended = False
        self._switching = False
        self._silent = self._told_silent = False
        self._reported: dict[str, float] = {}
        self._last_gate: gate.GateDecision | None = None
        self._last_motion: tuple[float, int] = (self._began_s, -1)
        self._disks: dict[str, tuple[int, int, bool]] = {}
        self._monitor_errors = 0
        # What the end of the journal tells.
        self.released_s: float | None = None
        self.released_reason = ""
        self.ram_sent_bytes = 0
        self.last_ram: RamStats | None = None
        self.hold_began_s: float | None = None

    # --- what others ask and tell -----------------------------------------------------

    @property
    def hold_kind(self) -> str | None:
        """What the hold was found to be. Let go before that was known, it proved nothing: best-effort."""
        if self._hold.kind is None and self.hold_began_s is not None:
            return switchover.HoldKind.BEST_EFFORT.value
        return self._hold.kind.value if self._hold.kind else None

    @property
    def let_go(self) -> bool:
        """Whether the guest may have been stopped here in order to run over there."""
        return self.released_s is not None or self._switching

    @property
    def held_s(self) -> float:
        if self.hold_began_s is None:
            return 0.0
        return (self.released_s or self._aborted_s or self._clock.monotonic_s()) - self.hold_began_s

    @property
    def disk_sent_bytes(self) -> int:
        return sum(copied for copied, _, _ in self._disks.values())

    def ask_release(self, by: str) -> str:
        """A person lets go. Returns what will happen, in a sentence."""
        if self.released_s is not None:
            return "it has been released already"
        self._release_asked = by
        if self._hold.holding:
            return "released"
        return "it will be released as soon as it is held" if self._request.gated else "nothing is held"

    def ask_unheld(self, by: str) -> bool:
        """Somebody ends it now, held or not -> whether a release does that.

        Otherwise it is never held: whoever asks has other means (the guest is paused, say), and nothing
        of ours shall stand in the way.
        """
        if self.released_s is None and not self._hold.holding:
            self._unheld_asked = by
            return False
        self._release_asked = self._release_asked or by
        return self._unheld_asked is None

    def ask_abort(self, error: VirtgridError) -> None:
        """End it; the first reason given stays."""
        self._ending = self._ending or error

    # --- the loop ---------------------------------------------------------------------

    async def run(self, call: Awaitable[None]) -> None:
        """Supervise ``call`` (the migrate call) to its end. Errors: why it did not migrate."""
        task = asyncio.ensure_future(call)
        try:
            if self._tickler and self._request.gated:
                self._tickler.start()
            await self._supervise(task)
        finally:
            if self._tickler:
                self._tickler.stop()
            await self._pulse.close()
            if not task.done():
                if not self._abort_sent and await self._abort_job():
                    # What we raise here is a bug of ours: the migration must not go on without us.
                    await asyncio.wait([task], timeout=_RETURN_DEADLINE_S)
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, VirtgridError):
                await task

    async def _supervise(self, task: asyncio.Future[None]) -> None:
        while not task.done():
            try:
                await self._look()
                self._monitor_errors = 0
            except (NotFoundError, LibvirtError, MonitorError) as error:
                # Mostly the end: the domain has just left. Otherwise the call will say, or we do.
                self._monitor_errors += 1
                if self._monitor_errors == _MONITOR_ERRORS:
                    self.ask_abort(
                        MigrationFailedError("QEMU's monitor stopped answering", cause=error.cause)
                    )
            except PeerUnreachableError as error:
                self.ask_abort(_monitor_lost(error))
                await self._end_call(task)
                return
            if self._ending is not None and not self._abort_sent:
                await self._end_call(task)
                return
            poll_s = _IDLE_POLL_S if self._storage_far_from_done() else _HOLD_POLL_S
            await asyncio.wait([task], timeout=poll_s)
        await self._result(task)
        self._lost_if_not_released()  # through before the first look at its memory, perhaps

    async def _look(self) -> None:
        """One look at everything, and what follows from it."""
        now_s = self._clock.monotonic_s()
        self._observe()
        status = await self._monitor.migration()
        if self._unheld_asked is not None and self.released_s is None:
            await self._leave_unheld(self._unheld_asked, now_s)
        # Until memory is copied the status may be that of the migration which brought the guest here.
        if status.copying_memory and status.ram is not None:
            await self._look_at_memory(status.ram, now_s)
        elif self.last_ram is not None and status.switching:
            self._switching = True
            self._enter("switchover")
        else:
            self._enter("storage" if self._request.copy_storage else "precopy")
            if self._request.copy_storage:
                await self._look_at_storage(now_s)
        await self._look_for_trouble(status, now_s)

    def _observe(self) -> None:
        """Connections: changes into the journal, a count for the policy."""
        if self._watch is None:
            return
        changes = self._watch.changes()
        for change in changes:
            self._journal.write(
                "connection", client=change.client, server=change.server, protocol=change.protocol,
                verdict=change.verdict, reason=change.reason, state=change.state,
                seen_s=round(change.at_s, 6),
            )  # fmt: skip
        snapshot = self._watch.snapshot()
        self._observation = Observation.of(snapshot)
        self._policy = self._policy.observe(self._observation)
        self._requests = drain.under_way(snapshot)
        self._spells = self._spells.look(snapshot.at_s, self._requests, changes)
        if self._due("connections", snapshot.at_s, _REPORT_EVERY_S):
            self._journal.write(
                "connections", total=snapshot.total, suitable=snapshot.suitable,
                unsuitable=snapshot.unsuitable - snapshot.unknown, unknown=snapshot.unknown,
            )  # fmt: skip

    async def _look_at_storage(self, now_s: float) -> None:
        names = {f"drive-{disk.alias}": disk.target for disk in self._plan.facts.xml.disks if disk.alias}
        for job in await self._monitor.block_jobs():
            disk = names.get(job.device, job.device)
            known = self._disks.get(disk)
            self._disks[disk] = (job.copied_bytes, job.total_bytes, job.ready)
            if known is None or job.ready != known[2] or self._due(f"storage {disk}", now_s, _REPORT_EVERY_S):
                self._journal.write(
                    "storage",
                    disk=disk,
                    copied_bytes=job.copied_bytes,
                    total_bytes=job.total_bytes,
                    ready=job.ready,
                )

    async def _look_at_memory(self, ram: RamStats, now_s: float) -> None:
        if self._phase == "storage":
            await self._look_at_storage(now_s)  # the last look: the mirrors are ready now
        if not self._hold.holding and self.released_s is None:
            self._enter("precopy")
        self.last_ram = ram
        self.ram_sent_bytes = ram.sent_bytes
        if self._due("ram", now_s, _REPORT_EVERY_S):
            self._journal.write(
                "ram", iteration=ram.sync_count, remaining_bytes=ram.remaining_bytes,
                sent_bytes=ram.sent_bytes, total_bytes=ram.total_bytes,
                dirty_bytes_s=ram.dirty_bytes_s, speed_bytes_s=ram.speed_bytes_s,
                limit_bytes_s=self._hold.limit_bytes_s,
                since_sync_s=round(switchover.since_sync_s(self._hold, now_s), 3),
            )  # fmt: skip
        if not self._request.gated or self.released_s is not None:
            return
        self._pulse.beat(now_s)
        config = self._hold_config or await self._configure()
        was = self._hold
        self._hold, command = switchover.step(self._hold, ram, now_s, config)
        if command is not None:
            await self._monitor.set_limits(bandwidth_bytes_s=command.bandwidth_bytes_s)
            self._journal.write(
                "clamp", limit_bytes_s=command.bandwidth_bytes_s, mode=command.reason,
                remaining_bytes=ram.remaining_bytes,
            )  # fmt: skip
        if self._hold.holding:
            if self._tickler and self._tickler.keep_running() and self._due("tickler", now_s, 5.0):
                self._journal.write("note", text="what tickles the guest had ended, and was started again")
            if not was.holding:
                self.hold_began_s = now_s
                self._hold_config = replace(config, budget_bytes=self._budget_bytes())
                self._policy = self._policy.begin(now_s)
                self._enter("hold", f"{format_size(ram.remaining_bytes)} remaining")
            if self._hold.kind is not was.kind and self._hold.kind is not None:
                self._say_kind(ram)
            await self._judge(ram, now_s)

    async def _configure(self) -> switchover.HoldConfig:
        """The hold's numbers, once memory is being copied and libvirt has told QEMU its limits."""
        parameters = await self._monitor.parameters()
        full_bytes_s = int(parameters.get("max-bandwidth") or 1 << 40)
        if self._request.sharing is not None:
            # libvirt counts whole MiB/s; what the class does not carry would only wait in front of it.
            full_bytes_s = int(self._request.precopy_bytes_s or full_bytes_s)
            await self._monitor.set_limits(bandwidth_bytes_s=full_bytes_s)
        if SWITCHOVER_BANDWIDTH in parameters:
            await self._monitor.set_limits(switchover_bytes_s=switchover.HOLD_SWITCHOVER_BYTES_S)
        self._hold_config = switchover.HoldConfig(
            full_bytes_s=full_bytes_s,
            budget_bytes=self._budget_bytes(),
            tickled=self._tickler is not None,
        )
        return self._hold_config

    def _bandwidth_bytes_s(self) -> float:
        """What the wire carries when let go: the best speed seen, but no more than was asked for."""
        return min(self._hold.speed_bytes_s, self._request.bandwidth_bytes_s or float("inf"))

    def _budget_bytes(self) -> int:
        """What may be left to send in a pause. Before a speed was seen, 100 Mbit/s is assumed."""
        return round(self._memory_budget_s * (self._bandwidth_bytes_s() or 12.5e6))

    def _say_kind(self, ram: RamStats) -> None:
        kind, drip = self._hold.kind, self._hold.drip_bytes_s
        texts = {
            switchover.HoldKind.STRICT: "no page leaves while clamped; refreshed on purpose",
            switchover.HoldKind.TICKLED: f"QEMU drips {format_size(drip)}/s; a small frame to the guest's tap"
            " keeps a quiet guest from completing",
            switchover.HoldKind.BEST_EFFORT: f"QEMU drips {format_size(drip)}/s and no tap can be tickled:"
            " a guest that writes nothing completes",
        }
        assert kind is not None
        self._journal.write(
            "hold",
            kind=kind.value,
            text=texts[kind],
            remaining_bytes=ram.remaining_bytes,
            drip_bytes_s=round(drip),
        )

    # --- the gate ---------------------------------------------------------------------

    def _memory(self, ram: RamStats, now_s: float) -> gate.MemoryStats:
        # In the first pass QEMU has never looked at what the guest dirtied meanwhile.
        known = ram.sync_count > 1
        return gate.MemoryStats(
            remaining_bytes=ram.remaining_bytes if known else math.inf,
            dirty_bytes_s=ram.dirty_bytes_s,
            bandwidth_bytes_s=self._bandwidth_bytes_s(),
            since_sync_s=switchover.since_sync_s(self._hold, now_s),
        )

    async def _judge(self, ram: RamStats, now_s: float) -> None:
        """Ask the gate and do what it says."""
        assert self.hold_began_s is not None
        assert self._hold_config is not None
        memory = self._memory(ram, now_s)
        decision = gate.decide(memory, self._observation, self._policy, self._gate, now_s, self.hold_began_s)
        silent_s = self._pulse.silent_s(now_s)
        if silent_s and (self._release_asked is not None or decision.decision is gate.Decision.RELEASE):
            why = f"the destination has not answered for {format_duration(silent_s)}: not let go towards it"
            decision = replace(decision, decision=gate.Decision.HOLD, reason=why)
            self._say_decision(decision, now_s)
            return
        self._say_decision(decision, now_s)
        if self._release_asked is not None:
            await self._release("user", f"asked for by {self._release_asked or 'a person'}", decision)
        elif decision.decision is gate.Decision.RELEASE:
            await self._release("timeout" if decision.timed_out else "gate", decision.reason, decision)
        elif decision.decision is gate.Decision.ESCALATE:
            # Make memory fit: a younger picture of the guest at the price of bandwidth.
            self._hold_config = replace(
                self._hold_config, drip_share=1.0, budget_bytes=self._budget_bytes() // 2
            )
        elif decision.decision is gate.Decision.ABORT:
            self.ask_abort(
                HoldTimeoutError(
                    "gave up waiting for the guest's connections",
                    cause=decision.reason,
                    hint=f"--max-wait, or --on-timeout release; {self._plan.name} has not been touched",
                )
            )

    def _say_decision(self, decision: gate.GateDecision, now_s: float) -> None:
        last = self._last_gate
        changed = last is None or (last.decision, last.allowed) != (decision.decision, decision.allowed)
        news = last is None or last.unsuitable != decision.unsuitable or self._due("gate alive", now_s, 2.0)
        if changed or (news and self._due("gate", now_s, _GATE_REPORT_EVERY_S)):
            self._last_gate = decision
            self._journal.write("gate", **decision.fields())

    async def _release(self, by: str, reason: str, decision: gate.GateDecision) -> None:
        assert self._hold_config is not None
        draining = self._drain()
        if self._letting_go is not None:
            await self._letting_go(draining)
            if self._ending is not None:
                return  # aborted meanwhile; what was turned is given back
        if self._request.sharing is not None:
            raised_bytes_s = int(self._request.release_bytes_s or self._hold_config.full_bytes_s)
            self._hold_config = replace(self._hold_config, full_bytes_s=raised_bytes_s)
        self._hold, command = switchover.release(self._hold, self._hold_config)
        self.released_s = self._clock.monotonic_s()
        self.released_reason = reason
        await self._monitor.set_limits(
            bandwidth_bytes_s=command.bandwidth_bytes_s, downtime_s=command.downtime_s
        )
        fields: dict[str, Any] = (
            {"unsuitable": decision.unsuitable} if decision.unsuitable is not None else {}
        )
        if self._plan.facts.way is not None:
            fields |= {"drain_s": round(draining.for_s, 3), "drain": draining.reason}
        if decision.downtime_estimate_s is not None:
            fields["downtime_estimate_s"] = round(decision.downtime_estimate_s, 4)
        if self.last_ram is not None:
            fields["remaining_bytes"] = self.last_ram.remaining_bytes
        self._journal.write("released", by=by, reason=reason, held_s=round(self.held_s, 3), **fields)
        self._enter("release")

    async def _leave_unheld(self, by: str, now_s: float) -> None:
        self.released_s, self.released_reason = now_s, f"not held any more: asked for by {by or 'a person'}"
        full_bytes_s = self._hold_config.full_bytes_s if self._hold_config is not None else None
        await self._monitor.set_limits(
            bandwidth_bytes_s=full_bytes_s, downtime_s=switchover.RELEASE_DOWNTIME_S
        )
        self._journal.write("released", by="user", reason=self.released_reason)

    def _drain(self) -> Drain:
        """Whether and how long to drain; without a way that is of no account."""
        if self._request.drain == "off":
            return Drain(for_s=0.0, reason="not wanted (--drain off)")
        if self._observation is None:
            return Drain(for_s=0.0, reason="the connections cannot be seen")
        return drain.decide(self._spells, self._requests, DrainConfig())

    # --- trouble ----------------------------------------------------------------------

    async def _look_for_trouble(self, status: MigrationStatus, now_s: float) -> None:
        """Peers that went away, bytes that stopped moving, time that is up."""
        if self._phase == "switchover":
            self._lost_if_not_released()
            return
        if self._destination.lost is not None:
            self.ask_abort(
                MigrationFailedError(
                    "the destination went away during the migration", cause=self._destination.lost
                )
            )
        sent = (status.ram.sent_bytes if status.ram else 0) + self.disk_sent_bytes
        if sent != self._last_motion[1] or self._hold.kind is switchover.HoldKind.STRICT:
            self._last_motion = (now_s, sent)
        elif now_s - self._last_motion[0] > self._request.stall_timeout_s:
            self.ask_abort(
                MigrationFailedError(
                    f"not a byte has moved for {format_duration(self._request.stall_timeout_s)}",
                    hint="is the link between the hosts down? --stall-timeout allows more",
                )
            )
        silent_s = self._pulse.silent_s(now_s)
        if (silent_s > 0) is not self._told_silent:
            self._told_silent = not self._told_silent
            text = "does not answer: not let go until it does" if self._told_silent else "answers again"
            self._journal.write("note", text=f"the destination {text}")
        if self.released_s is None and silent_s > self._request.stall_timeout_s:
            self.ask_abort(
                MigrationFailedError(
                    f"the destination has not answered for {format_duration(silent_s)}",
                    hint="is its libvirtd hanging? --stall-timeout allows more",
                )
            )
        timeout_s = self._request.timeout_s
        if timeout_s is not None and now_s - self._began_s > timeout_s and not self._suspended:
            # As virsh: the guest is suspended so that the migration ends; libvirt resumes it over there.
            self._suspended = True
            self._journal.write(
                "released",
                by="timeout",
                reason=f"--timeout {format_duration(timeout_s)}: the guest is suspended",
            )
            self.released_s = self.released_s or now_s
            self.released_reason = "--timeout"
            await self._domain.suspend()
            if self._hold_config is not None:
                await self._monitor.set_limits(
                    bandwidth_bytes_s=self._hold_config.full_bytes_s, downtime_s=switchover.RELEASE_DOWNTIME_S
                )

    def _lost_if_not_released(self) -> None:
        if self._request.gated and self.released_s is None:
            self.released_s = self._clock.monotonic_s()
            self._journal.write("hold_lost", text="QEMU completed although it was not released")

    async def _end_call(self, task: asyncio.Future[None]) -> None:
        """Abort the job and wait for the call; whatever it says, it may still have succeeded."""
        heard = await self._abort_job()
        await asyncio.wait([task], timeout=_UNHEARD_DEADLINE_S)
        # A silent destination keeps the call much longer than it keeps the guest: see virt/migrate.py.
        if heard and not task.done() and not self._silent:
            await self._cut_storage("the storage copy did not end: it was cut off")
            await asyncio.wait([task], timeout=_RETURN_DEADLINE_S)
        await self._result(task)

    async def _abort_job(self) -> bool:
        """Tell libvirt to end the migration -> whether it heard."""
        self._abort_sent = True
        self._aborted_s = self._clock.monotonic_s()
        self._enter("cleanup")
        self._silent = await self._peer_silent()
        if self._silent and self._request.copy_storage:
            # First of all: told to cancel a mirror whose peer is silent, QEMU stops and waits for it.
            await self._cut_storage("the destination is silent: the storage copy was cut off")
        try:
            await self._domain.abort_job()
        except VirtgridError:
            # Our control connection is the problem, perhaps: try a fresh one before giving up.
            try:
                await self._rescue()
            except VirtgridError:
                return False
        return True

    async def _cut_storage(self, text: str) -> None:
        with contextlib.suppress(VirtgridError):
            if await self._monitor.cut_storage():
                self._journal.write("note", text=text)

    async def _result(self, task: asyncio.Future[None]) -> None:
        if not task.done():
            raise self._ending or MigrationFailedError("libvirt does not come back from the migrate call")
        try:
            await task
        except VirtgridError as error:
            if self._ending is not None:
                self._ending.cause = self._ending.cause or error.cause
                raise self._ending from error
            raise _explain(error) from error

    def _storage_far_from_done(self) -> bool:
        """Whether memory cannot begin within the next look: a small guest is copied in no time."""
        if self._phase not in ("", "storage") or not self._request.copy_storage:
            return False
        return not self._disks or any(
            not ready and copied < 0.95 * total for copied, total, ready in self._disks.values()
        )

    # --- small things -----------------------------------------------------------------

    def _enter(self, phase: str, text: str | None = None) -> None:
        if phase != self._phase:
            self._phase = phase
            if text is None:
                self._journal.write("phase", phase=phase)
            else:
                self._journal.write("phase", phase=phase, text=text)

    def _due(self, what: str, now_s: float, every_s: float) -> bool:
        if now_s - self._reported.get(what, -1e9) < every_s:
            return False
        self._reported[what] = now_s
        return True


def _monitor_lost(error: PeerUnreachableError) -> MigrationFailedError:
    """Why nothing can be held or released any more: a hanging QEMU or libvirtd, or one that went away."""
    if isinstance(error, DeadlineError):
        return MigrationFailedError(
            "QEMU's monitor does not answer, so the migration can be neither held nor released",
            cause=error.cause,
            hint="is QEMU or libvirtd on the source hanging?",
        )
    return MigrationFailedError("the source's libvirtd went away during the migration", cause=error.cause)


def memory_budget_s(plan: MigrationPlan) -> float:
    """How much of the agreed pause memory may take: all but what the hand-over itself costs.

    That is some three round trips between the hosts (stop, mirrors flushed, continue, run) and what
    both QEMUs need; measured in the lab. Half the pause is left to memory whatever the distance.
    """
    agreed_s = plan.request.max_downtime_s
    hand_over_s = 0.05 + 3 * plan.facts.destination.round_trip_s
    return max(agreed_s / 2, agreed_s - hand_over_s)


def _explain(error: VirtgridError) -> VirtgridError:
    """libvirt's reason for a failed migrate call, with what can be done about it."""
    cause = error.cause or ""
    if isinstance(error, LibvirtError):
        hint = error.hint
        if "No space left" in cause or "block job" in cause:
            hint = "is the disk of the destination full?"
        elif "Channel error" in cause or "Unable to write to socket" in cause:
            # QEMU tells a stream cancelled in the middle of a write as a broken one.
            hint = "the stream between the hosts broke: the link, the QEMU over there, or a virsh domjobabort"
        elif any(word in cause.casefold() for word in ("tls", "certificate", "x509")):
            hint = (
                "with --tls each host needs its certificate in /etc/pki/qemu: virtgrid pki, virt-pki-validate"
            )
        texts = ("operation aborted", "canceled by client", "was cancelled")
        if error.aborted or any(text in cause for text in texts):
            return AbortedError(
                "the migration was aborted by somebody else (virsh domjobabort?)", cause=cause
            )
        return MigrationFailedError("libvirt could not migrate the domain", cause=cause, hint=hint)
    if isinstance(error, PeerUnreachableError):
        # Not "unreachable": it was reached, something was begun, and where the domain is must be said.
        return MigrationFailedError("a host went away during the migration", cause=cause, hint=error.hint)
    return error

"""One migration from the first question to the last look: the sequence, and what undoes each step.

Every step that leaves something behind pushes its undoing on one stack, so that a failure at any
point unwinds in reverse order. After any failure both hosts are *looked at* before anything is
said about where the domain is (``outcome.judge``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

from virtgrid.core.clock import Clock
from virtgrid.core.errors import (
    AbortedError,
    MigrationFailedError,
    PositionUnknownError,
    RefusedError,
    VirtgridError,
)
from virtgrid.core.journal import Journal
from virtgrid.migration import facts as gathering
from virtgrid.migration import preflight, running
from virtgrid.migration.control import ControlServer
from virtgrid.migration.copying import Copy
from virtgrid.migration.cure import Silence, cure, gone
from virtgrid.migration.drain import Drain
from virtgrid.migration.flip import Flip
from virtgrid.migration.guestname import GuestName
from virtgrid.migration.outcome import Place, Repair, Situation, judge
from virtgrid.migration.plan import MigrationPlan, MigrationRequest, make_plan
from virtgrid.migration.prepare import HoldLimits, TargetImages
from virtgrid.migration.share import Wan
from virtgrid.migration.verify import Answer, verify
from virtgrid.migration.watch import Watch, capture_note
from virtgrid.virt.connection import Hypervisor, QemuEvent
from virtgrid.virt.domain import Domain, look
from virtgrid.virt.fence import Fence
from virtgrid.virt.migrate import MigrateCall
from virtgrid.virt.monitor import Monitor, QemuMonitor

#: After a failure libvirt needs a moment to clear the other side; ask again until it has.
_SETTLE_DEADLINE_S: Final = 25.0
_EVENT_GRACE_S: Final = 3.0

OpenWatch = Callable[[MigrationPlan], Watch]
OpenMonitor = Callable[[Hypervisor, str], Monitor]


@dataclass(slots=True)
class _Switch:
    """What was heard of the moment itself. Clocks: QEMU's own stamps; received: this host's."""

    stopped: QemuEvent | None = None
    resumed: QemuEvent | None = None
    unsuitable: int | None = None

    def downtime_s(self, destination_way_s: float) -> float | None:
        """Seconds from the stopped to the running guest.

        QEMU's own stamps when both hosts' clocks agree with what we heard and when; otherwise
        the times of hearing, less the way from the destination.
        """
        if self.stopped is None or self.resumed is None:
            return None
        heard = self.resumed.received_s - self.stopped.received_s - destination_way_s
        stamped = self.resumed.clock_s - self.stopped.clock_s
        # Hearing can only be late, by queues on the WAN; a stamp far outside that is another clock.
        return stamped if 0 <= stamped <= heard + 0.1 and heard - stamped < 1.0 else max(0.0, heard)


class Driver:
    """Drives one migration. ``await run()`` returns the fields of ``finished``, or raises.

    Whatever happens, the journal's last line says where the domain is. ``request_abort`` and
    ``request_release`` may be called from the same event loop at any time.
    """

    def __init__(
        self,
        request: MigrationRequest,
        journal: Journal,
        clock: Clock,
        migration_id: str,
        *,
        open_watch: OpenWatch,
        open_monitor: OpenMonitor = QemuMonitor,
    ) -> None:
        self._request = request
        self._journal = journal
        self._clock = clock
        self._id = migration_id
        self._open_watch = open_watch
        self._open_monitor = open_monitor
        self._copy: Copy | None = None
        self._abort_asked: VirtgridError | None = None
        self._switch = _Switch()
        self._began_s = clock.monotonic_s()
        self._plan: MigrationPlan | None = None
        self._watch: Watch | None = None
        self._situation: Situation | None = None
        self._fence = Fence(())
        self._token = migration_id.partition("-")[0]

    # --- what people ask while it runs -------------------------------------------------

    def request_abort(self, by: str, error: VirtgridError | None = None) -> None:
        """End it safely; the domain stays on the source unless the switchover has begun."""
        self._abort_asked = error or AbortedError(f"aborted on request{f' ({by})' if by else ''}")
        self._journal.write("user", action="abort", by=by)
        if self._copy is not None:
            self._copy.ask_abort(self._abort_asked)

    def request_release(self, by: str) -> str:
        """Let go of the switchover now. Returns what will happen."""
        self._journal.write("user", action="release", by=by)
        return self._copy.ask_release(by) if self._copy is not None else "memory is not being copied yet"

    async def _on_command(self, command: str, by: str) -> dict[str, Any]:
        if command == "release":
            return {"ok": True, "text": self.request_release(by)}
        if command == "abort":
            self.request_abort(by)
            return {"ok": True, "text": "aborting"}
        return {"ok": True, "id": self._id, "pid": os.getpid()}

    # --- the sequence -------------------------------------------------------------------

    async def run(self, source: Hypervisor, destination: Hypervisor, domain: Domain) -> dict[str, Any]:
        """Migrate ``domain``; connections belong to the caller. Errors: any VirtgridError."""
        try:
            async with AsyncExitStack() as undo:
                return await self._migrate(undo, source, destination, domain)
        except VirtgridError as error:
            raise await self._fail(error, source, domain) from error
        except Exception as error:
            # A bug of ours must still end with the truth about where the domain is.
            bug = MigrationFailedError(
                "virtgrid itself failed", cause=f"{type(error).__name__}: {error}", hint="this is a bug"
            )
            raise await self._fail(bug, source, domain) from error

    async def plan(self, source: Hypervisor, destination: Hypervisor, domain: Domain) -> MigrationPlan:
        """Gather the facts and bring them together with the request; nothing is changed."""
        found = await gathering.gather(self._request, source, destination, domain, own_id=self._id)
        return make_plan(self._request, found)

    async def _migrate(
        self, undo: AsyncExitStack, source: Hypervisor, destination: Hypervisor, domain: Domain
    ) -> dict[str, Any]:
        undo.enter_context(running.exclusive(domain.uuid, self._id))
        self._journal.write("phase", phase="preflight")
        plan = self._plan = await self.plan(source, destination, domain)
        self._check(plan)
        self._journal.write("phase", phase="prepare")
        self._stop_if_asked()
        await undo.enter_async_context(ControlServer(running.socket_path(domain.uuid), self._on_command))
        if plan.facts.tap_visible:
            self._begin_watch(undo, plan)
        name = await undo.enter_async_context(GuestName(self._journal, self._clock, plan, self._id))
        await name.lower()
        # Only images that are copied: one that both hosts share must stay free for the other QEMU.
        self._fence = Fence(disk.path for disk in plan.facts.disks)
        undo.callback(self._fence.drop)
        await self._listen(source, destination, domain)
        images = await undo.enter_async_context(
            TargetImages(
                self._journal, destination, self._request.dest_uri, plan.to_create, token=self._token
            )
        )
        limits = HoldLimits(self._journal, domain, self._request.source_uri)
        if self._request.gated:
            await undo.enter_async_context(limits)
        flip = await undo.enter_async_context(Flip(plan, self._journal))
        wan = await undo.enter_async_context(Wan(plan, self._journal))
        calling = await undo.enter_async_context(
            MigrateCall(self._request.source_uri, self._request.dest_uri)
        )

        async def letting_go(drain: Drain) -> None:
            await wan.release()
            await flip.let_go(drain)

        self._copy = self._copier(plan, source, destination, domain, letting_go)
        self._stop_if_asked()
        try:
            await self._copy.run(calling.run(domain.uuid, plan.options))
        except Exception as error:
            # Look before anything is undone: the images may be the ones the guest now runs on.
            if self._fence.held:
                self._journal.write(
                    "note", text="kept from running here again until the destination is asked"
                )
            self._situation = await self._settle(domain)
            await flip.leave(self._situation.place)
            if self._situation.place is not Place.DESTINATION or self._situation.repairs:
                if not self._never_left(self._situation, destination):
                    images.keep("the domain may be using it")
                    await name.leave(there=self._situation.place is Place.DESTINATION)
                raise
            self._arrived_after(error)
        images.keep()
        limits.keep()
        await flip.arrived()
        await wan.end()
        self._arrived(plan)
        return await self._finish(plan, destination, domain, name)

    # --- what a migration is made of, whoever makes the call (see gatekeeper) -----------

    def _begin_watch(self, undo: AsyncExitStack, plan: MigrationPlan) -> None:
        self._watch = self._open_watch(plan)
        undo.callback(self._watch.close)
        if note := capture_note(self._watch.capture):
            self._journal.write("note", text=note)

    def _copier(
        self,
        plan: MigrationPlan,
        source: Hypervisor,
        destination: Hypervisor,
        domain: Domain,
        letting_go: Callable[[Drain], Awaitable[None]],
    ) -> Copy:
        return Copy(
            plan,
            self._journal,
            self._clock,
            domain=domain,
            monitor=self._open_monitor(source, domain.uuid),
            destination=destination,
            watch=self._watch,
            rescue=lambda: self._rescue(domain),
            peer_silent=lambda: self._destination_silent(destination, domain),
            letting_go=letting_go,
        )

    def _arrived_after(self, error: Exception) -> None:
        told = error.cause or error.what if isinstance(error, VirtgridError) else repr(error)
        self._journal.write("note", text=f"it has arrived all the same, after: {told}")

    def _arrived(self, plan: MigrationPlan) -> None:
        arrived = f"{plan.name} runs on {plan.facts.destination.hostname}"
        self._situation = Situation(place=Place.DESTINATION, repairs=(), text=arrived)

    def _checks(self, plan: MigrationPlan) -> tuple[preflight.Check, ...]:
        return preflight.preflight(plan)

    def _check(self, plan: MigrationPlan) -> None:
        """Preflight: every finding into the journal; FAIL refuses."""
        checks = self._checks(plan)
        for check in checks:
            fields = {"name": check.name, "verdict": check.verdict.value, "text": check.text}
            self._journal.write("check", sync=False, **fields, **({"hint": check.hint} if check.hint else {}))
        if failed := preflight.failures(checks):
            raise RefusedError(
                f"{plan.name} was not migrated: {failed[0].text}",
                hint=failed[0].hint,
                cause="; ".join(check.text for check in failed[1:]) or None,
            )
        estimate = plan.estimate
        self._journal.write(
            "estimate",
            storage_s=estimate.storage_s,
            memory_s=estimate.memory_s,
            storage_bytes=estimate.storage_bytes,
            memory_bytes=estimate.memory_bytes,
            bandwidth_bytes_s=estimate.bandwidth_bytes_s,
        )

    def _stop_if_asked(self) -> None:
        if self._abort_asked is not None:
            raise self._abort_asked

    async def _listen(self, source: Hypervisor, destination: Hypervisor, domain: Domain) -> None:
        """Hear QEMU stop on the source and run on the destination."""

        def on_source(event: QemuEvent) -> None:
            if event.uuid != domain.uuid:
                return
            if event.name == "MIGRATION":
                if json.loads(event.details or "{}").get("status") == "completed":
                    # With its libvirtd gone already, nobody can run the guest over there.
                    self._fence.put_up(unless=lambda: destination.ended_by_peer)
                return
            self._switch.stopped = event
            # QEMU's stamp on this host's wall clock, brought to the monotonic one the tracker uses.
            at_s = event.received_s - max(
                0.0, time.time() - event.clock_s - (time.monotonic() - event.received_s)
            )
            if self._watch is not None:
                self._switch.unsuitable = self._watch.unsuitable_at(at_s)
            fields: dict[str, Any] = {"clock_s": event.clock_s}
            if self._switch.unsuitable is not None:
                fields["unsuitable"] = self._switch.unsuitable
            if self._copy is not None and self._copy.last_ram is not None:
                fields["remaining_bytes"] = self._copy.last_ram.remaining_bytes
            self._journal.write("stopped", **fields)

        def on_destination(event: QemuEvent) -> None:
            if event.uuid == domain.uuid and event.name == "RESUME" and self._switch.resumed is None:
                self._switch.resumed = event
                self._journal.write("resumed", clock_s=event.clock_s)

        await source.on_qemu_event("^(STOP|MIGRATION)$", on_source)
        await destination.on_qemu_event("^RESUME$", on_destination)

    async def _destination_silent(self, destination: Hypervisor, domain: Domain) -> bool:
        """Whether the destination does not answer within a few round trips, asked on a fresh connection."""
        deadline_s = 2.0 + 20 * (self._plan.facts.destination.round_trip_s if self._plan else 0.0)
        if destination.lost is not None:
            return True
        return await look(self._request.dest_uri, domain.uuid, deadline_s=deadline_s) is None

    async def _rescue(self, domain: Domain) -> None:
        """Abort over a fresh connection when the control connection was given up."""
        uri = self._request.source_uri
        async with await Hypervisor.open(uri, name="the source (rescue)", deadline_s=8) as fresh:
            await Domain(fresh, uuid=domain.uuid, name=domain.name).abort_job()

    # --- the ends -----------------------------------------------------------------------

    async def _finish(
        self, plan: MigrationPlan, destination: Hypervisor, domain: Domain, name: GuestName
    ) -> dict[str, Any]:
        assert self._copy is not None
        for _ in range(round(_EVENT_GRACE_S / 0.05)):
            if self._switch.resumed is not None:
                break
            await asyncio.sleep(0.05)  # the event is on its way over the WAN
        await name.move()
        self._journal.write("phase", phase="verify")
        answer = await self._verify(plan, destination, domain)
        await name.settle(answer.answering)
        sent_bytes = None
        with contextlib.suppress(VirtgridError):
            moved = Domain(destination, uuid=domain.uuid, name=domain.name)
            sent_bytes = await moved.completed_bytes()
        fields = self._figures(sent_bytes) | {
            "domain": plan.name,
            "on": plan.facts.destination.hostname,
            "exit_status": 0,
            "answering": answer.answering,
            **name.told(),
        }
        self._journal.write("finished", sync=True, **fields)
        return fields

    async def _verify(self, plan: MigrationPlan, destination: Hypervisor, domain: Domain) -> Answer:
        """Ask the guest at its new place; when it is silent, cure it or say why it is."""
        addresses = self._watch.addresses() if self._watch is not None else ()
        nic, within_s = plan.facts.tap, self._request.verify_timeout_s
        host = plan.facts.destination.hostname

        async def ask(deadline_s: float) -> Answer:
            return await verify(destination, domain.uuid, nic, addresses, deadline_s=deadline_s)

        def tell(tried: str, how: str) -> None:
            self._journal.write("cure", tried=tried, how=how)

        answer = Answer(answering="unknown", how="not asked (--verify-timeout 0)")
        found: Silence | None = None
        if within_s:
            answer = await ask(within_s)
        if answer.answering == "no" and nic is not None:
            ipv4 = next((address for address in addresses if ":" not in address), None)
            cured, found = await cure(destination, domain, nic, host, ipv4, ask=ask, tell=tell)
            answer = cured or answer
        elif answer.answering != "yes":
            found = await gone(destination, domain, host)
        self._journal.write(
            "verified",
            **_known(
                answering=answer.answering,
                how=answer.how,
                after_s=answer.after_s,
                why=found.why if found is not None else None,
            ),
        )
        if found is not None:
            self._journal.write("note", text=found.text, hint=found.hint)
        return answer

    def _figures(self, sent_bytes: int | None = None) -> dict[str, Any]:
        """What ``finished`` and ``failed`` both tell."""
        copy, plan = self._copy, self._plan
        way_s = plan.facts.destination.round_trip_s / 2 if plan else 0.0
        downtime_s = self._switch.downtime_s(way_s)
        total_s = self._clock.monotonic_s() - self._began_s
        return _known(
            policy=self._request.policy.name,
            hold=copy.hold_kind if copy else None,
            held_s=round(copy.held_s, 3) if copy else None,
            unsuitable_at_pause=self._switch.unsuitable,
            downtime_s=round(downtime_s, 4) if downtime_s is not None else None,
            total_s=round(total_s, 3),
            sent_bytes=sent_bytes
            if sent_bytes is not None
            else (copy.ram_sent_bytes + copy.disk_sent_bytes if copy else None),
            reason=copy.released_reason if copy else None,
        )

    async def _fail(self, error: VirtgridError, source: Hypervisor, domain: Domain) -> VirtgridError:
        """Complete the error with where the domain is, write the last line, return what to raise."""
        on: str | None = None
        if self._situation is None:
            on = await _hostname(source) or source.name
            error.where = error.where or f"{domain.name} is still on {on}"
        else:
            assert self._plan is not None
            facts, situation = self._plan.facts, self._situation
            error.where = situation.text
            if not situation.certain or (situation.place is Place.DESTINATION and situation.repairs):
                error = PositionUnknownError(
                    error.what,
                    where=situation.text,
                    cause=error.cause,
                    hint=f"when both hosts answer: virtgrid migration recover {self._id};"
                    " do not start it by hand",
                )
            elif situation.repairs:
                error.hint = f"virtgrid migration recover {self._id} removes what is left over"
            on = {Place.SOURCE: facts.source.hostname, Place.DESTINATION: facts.destination.hostname}.get(
                situation.place
            )
        told = _known(
            domain=domain.name,
            exit_status=error.exit_status,
            error=error.code,
            what=error.what,
            where=error.where,
            cause=error.cause,
            hint=error.hint,
        )
        self._journal.write("failed", sync=True, **(self._figures() | told | {"on": on}))
        return error

    async def _settle(self, domain: Domain) -> Situation:
        """Look at both hosts until libvirt has cleared up, or the time for that is over."""
        assert self._plan is not None
        facts = self._plan.facts
        deadline_s = self._clock.monotonic_s() + _SETTLE_DEADLINE_S
        while True:
            here, there = await asyncio.gather(
                look(self._request.source_uri, domain.uuid), look(self._request.dest_uri, domain.uuid)
            )
            situation = judge(domain.name, facts.source.hostname, facts.destination.hostname, here, there)
            # Behind a fence libvirt has tried to run it here again, and failed: the rest is ours to do.
            ours = self._fence.held and situation.repairs == (Repair.RESUME_SOURCE,)
            settled = situation.certain and (ours or not situation.repairs) and not (here and here.job)
            if settled or self._clock.monotonic_s() > deadline_s:
                return await self._repair(situation, domain) if situation.repairs else situation
            await self._clock.sleep(0.5)

    def _never_left(self, situation: Situation, destination: Hypervisor) -> bool:
        """Whether what was copied is worth nothing: the guest never ran on it."""
        if situation.place is Place.NOWHERE:
            # Shut off: here before it could leave, or over there after it had? The images tell nothing.
            stayed = self._copy is not None and not self._copy.let_go and self._switch.resumed is None
            return stayed and destination.lost is None
        return situation.place is Place.SOURCE and not situation.repairs

    async def _repair(self, situation: Situation, domain: Domain) -> Situation:
        """A failed migration left the guest stopped on the source only: let it run again."""
        if situation.repairs != (Repair.RESUME_SOURCE,):
            return situation
        assert self._plan is not None
        self._fence.drop()
        async with await Hypervisor.open(self._request.source_uri, name="the source") as fresh:
            await Domain(fresh, uuid=domain.uuid, name=domain.name).resume()
        host = self._plan.facts.source.hostname
        return Situation(place=Place.SOURCE, repairs=(), text=f"{domain.name} runs on {host} again")


async def _hostname(hypervisor: Hypervisor) -> str | None:
    try:
        return await hypervisor.hostname()
    except VirtgridError:
        return None


def _known(**fields: Any) -> dict[str, Any]:
    """The fields that have a value; the journal leaves unknown ones out."""
    return {name: value for name, value in fields.items() if value is not None}

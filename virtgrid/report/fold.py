"""Records taken one by one, giving a ``Status`` at any moment: pure, for unfinished journals too.

The live view feeds it as records are written; ``report.timeline`` makes the whole history of it.
Unknown events and fields are passed over: a reader must not fail on what a later writer adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from virtgrid.core.events import Record
from virtgrid.report.model import (
    Busy,
    Check,
    Clamp,
    CountSample,
    DiskSample,
    End,
    GateDecision,
    Hold,
    Lane,
    LaneSpan,
    Name,
    Note,
    Outcome,
    PhaseSpan,
    RamSample,
    Released,
    State,
    Status,
    Verified,
    clean,
    number,
    whole,
    yes_or_no,
)

#: (pid, pid_started) -> whether the process that wrote the journal still runs.
Alive = Callable[[int, object], bool]

_STATE_OF_PHASE: Final = {
    "preflight": State.PREPARING,
    "prepare": State.PREPARING,
    "storage": State.STORAGE,
    "precopy": State.PRECOPY,
    "hold": State.HOLDING,
    "release": State.SWITCHING,
    "switchover": State.SWITCHING,
    "verify": State.SWITCHING,
    "cleanup": State.SWITCHING,
}
#: Exit statuses that mean somebody asked for the end: aborted, interrupted.
_ASKED_FOR: Final = frozenset({6, 130})
#: A stop or resume may be stamped by QEMU; a stamp further off than this is another clock's.
_SAME_CLOCK_S: Final = 60.0


def _joined(value: object) -> str:
    """One name or several, as a person reads them: the first, and how many more."""
    if not isinstance(value, list | tuple):
        return clean(value)
    if not value:
        return ""
    more = f" and {len(value) - 1} more" if len(value) > 1 else ""
    return clean(value[0]) + more


class Fold:
    """Takes records, oldest first. Not safe to share between threads; the histories are for reading."""

    def __init__(self) -> None:
        self._origin: Record | None = None
        self._last: Record | None = None
        self._last_s = 0.0
        self._started: dict[str, Any] = {}
        self._phases: list[PhaseSpan] = []
        self.checks: list[Check] = []
        self.estimate: dict[str, float] = {}
        self.storage: list[DiskSample] = []
        self._disks: dict[str, DiskSample] = {}
        self._storage_fraction: float | None = None
        self.ram: list[RamSample] = []
        self._first_pass: float | None = None
        self.clamps: list[Clamp] = []
        self._lanes: dict[tuple[str, str], list[LaneSpan]] = {}
        self._protocols: dict[tuple[str, str], str] = {}
        self.counts: list[CountSample] = []
        self.gate: list[GateDecision] = []
        self._hold: Hold | None = None
        self._released: Released | None = None
        self._stopped_s: float | None = None
        self.stopped_unsuitable: int | None = None
        self._total_at_pause: int | None = None
        self._resumed_s: float | None = None
        self._downtime_s: float | None = None
        self._verified: Verified | None = None
        self._name: Name | None = None
        self.notes: list[Note] = []
        self._end: End | None = None
        self._summary: Mapping[str, Any] = {}
        self._state = State.PREPARING
        self._state_since_s = 0.0
        self._handlers: dict[str, Callable[[Record, float], None]] = {
            "started": self._on_started,
            "check": self._on_check,
            "estimate": self._on_estimate,
            "phase": self._on_phase,
            "storage": self._on_storage,
            "ram": self._on_ram,
            "clamp": self._on_clamp,
            "hold": self._on_hold,
            "hold_lost": self._on_hold_lost,
            "connections": self._on_connections,
            "connection": self._on_connection,
            "gate": self._on_gate,
            "released": self._on_released,
            "stopped": self._on_stopped,
            "resumed": self._on_resumed,
            "verified": self._on_verified,
            "name": self._on_name,
            "name_changed": self._on_name,
            "note": self._on_note,
            "left": self._on_left,
            "user": self._on_user,
            "finished": self._on_end,
            "failed": self._on_end,
            "recovered": self._on_end,
        }

    def add(self, record: Record) -> None:
        """Take the next record."""
        if self._origin is None:
            self._origin = record
        self._last_s = max(self._last_s, self.seconds(record))
        self._last = record
        if handler := self._handlers.get(record.event):
            handler(record, self._last_s)

    def seconds(self, record: Record) -> float:
        """Seconds since the first record; by UTC where the host was booted in between."""
        if self._origin is None:
            return 0.0
        by_mono = record.mono_s - self._origin.mono_s
        by_utc = (record.at - self._origin.at).total_seconds()
        return by_mono if by_mono >= self._last_s - 1.0 and abs(by_mono - by_utc) < 3600 else max(by_utc, 0.0)

    def _enter(self, state: State, at_s: float) -> None:
        if state is not self._state:
            self._state, self._state_since_s = state, at_s

    def _on_started(self, record: Record, at_s: float) -> None:
        self._started = dict(record.fields)

    def _on_check(self, record: Record, at_s: float) -> None:
        self.checks.append(
            Check(
                name=clean(record.get("name")),
                verdict=clean(record.get("verdict")).upper(),
                text=clean(record.get("text")),
                hint=clean(record.get("hint")),
            )
        )

    def _on_estimate(self, record: Record, at_s: float) -> None:
        self.estimate = {k: n for k, v in record.fields.items() if (n := number(v)) is not None}

    def _on_phase(self, record: Record, at_s: float) -> None:
        self._close_phase(at_s)
        name = clean(record.get("phase"))
        self._phases.append(PhaseSpan(name=name, start_s=at_s, end_s=None, text=clean(record.get("text"))))
        if state := _STATE_OF_PHASE.get(name):
            if state is State.SWITCHING:
                self._close_hold(at_s)
            elif state is State.HOLDING and (self._hold is None or self._hold.end_s is not None):
                self._open_hold(at_s)
            self._enter(state, at_s)

    def _close_phase(self, at_s: float) -> None:
        if self._phases and self._phases[-1].end_s is None:
            self._phases[-1] = replace(self._phases[-1], end_s=at_s)

    def _mark_broken(self) -> None:
        """The phase that failed is the one before the clean-up that followed."""
        for index in reversed(range(len(self._phases))):
            if self._phases[index].name != "cleanup":
                self._phases[index] = replace(self._phases[index], broken=True)
                return

    def _on_storage(self, record: Record, at_s: float) -> None:
        sample = DiskSample(
            at_s=at_s,
            disk=clean(record.get("disk")),
            copied_bytes=whole(record.get("copied_bytes")) or 0,
            total_bytes=whole(record.get("total_bytes")) or 0,
            ready=bool(record.get("ready")),
            bytes_s=number(record.get("bytes_s")),
        )
        self.storage.append(sample)
        self._disks[sample.disk] = sample
        total = sum(d.total_bytes for d in self._disks.values())
        copied = sum(d.total_bytes if d.ready else d.copied_bytes for d in self._disks.values())
        if total > 0:
            self._storage_fraction = max(self._storage_fraction or 0.0, min(1.0, copied / total))

    def _on_ram(self, record: Record, at_s: float) -> None:
        sample = RamSample(
            at_s=at_s,
            iteration=whole(record.get("iteration")) or 0,
            remaining_bytes=whole(record.get("remaining_bytes")) or 0,
            sent_bytes=whole(record.get("sent_bytes")) or 0,
            total_bytes=whole(record.get("total_bytes")),
            dirty_bytes_s=number(record.get("dirty_bytes_s")),
            speed_bytes_s=number(record.get("speed_bytes_s")),
            limit_bytes_s=number(record.get("limit_bytes_s")),
        )
        self.ram.append(sample)
        if sample.iteration > 1:
            self._first_pass = 1.0
        elif sample.total_bytes:
            done = 1.0 - sample.remaining_bytes / sample.total_bytes
            self._first_pass = max(self._first_pass or 0.0, min(1.0, max(0.0, done)))

    def _on_clamp(self, record: Record, at_s: float) -> None:
        limit = number(record.get("limit_bytes_s")) or 0.0
        self.clamps.append(Clamp(at_s=at_s, limit_bytes_s=limit, mode=clean(record.get("mode"))))

    def _on_hold(self, record: Record, at_s: float) -> None:
        # Its kind is told some time after it began, and may be told again: still the same hold.
        start_s = self._hold.start_s if self._hold and self._hold.end_s is None else at_s
        self._open_hold(start_s, record.get("kind"), record.get("text"), number(record.get("max_s")))
        if record.get("then") and self._hold:
            self._hold = replace(self._hold, then=clean(record.get("then")))
        self._enter(State.HOLDING, at_s)

    def _option(self, name: str) -> object:
        """An option of the call, or of a group of options such as the policy's."""
        options = self._started.get("options")
        if not isinstance(options, Mapping):
            return None
        groups = [options, *(value for value in options.values() if isinstance(value, Mapping))]
        return next((group[name] for group in groups if name in group), None)

    def _open_hold(
        self, at_s: float, kind: object = "", text: object = "", max_s: float | None = None
    ) -> None:
        self._hold = Hold(
            kind=clean(kind),
            text=clean(text),
            start_s=at_s,
            end_s=None,
            max_s=number(self._option("max_wait_s")) if max_s is None else max_s,
            then=clean(self._option("on_timeout")),
        )

    def _close_hold(self, at_s: float, lost: bool = False) -> None:
        if self._hold and self._hold.end_s is None:
            self._hold = replace(self._hold, end_s=at_s, lost=lost)

    def _on_hold_lost(self, record: Record, at_s: float) -> None:
        self._close_hold(at_s, lost=True)
        self._enter(State.SWITCHING, at_s)
        self.notes.append(Note(at_s=at_s, kind="hold_lost", text=clean(record.get("text"))))

    def _on_connections(self, record: Record, at_s: float) -> None:
        self.counts.append(
            CountSample(
                at_s=at_s,
                total=whole(record.get("total")) or 0,
                suitable=whole(record.get("suitable")) or 0,
                unknown=whole(record.get("unknown")) or 0,
            )
        )

    def _on_connection(self, record: Record, at_s: float) -> None:
        key = clean(record.get("client"), 100), clean(record.get("server"), 100)
        verdict = clean(record.get("verdict"))
        self._protocols[key] = clean(record.get("protocol"), 40)
        spans = self._lanes.setdefault(key, [])
        if spans and spans[-1].end_s is None:
            spans[-1] = replace(spans[-1], end_s=at_s)
        if verdict != "closed":
            reason = clean(record.get("reason") or record.get("state"))
            spans.append(LaneSpan(verdict=verdict, start_s=at_s, end_s=None, reason=reason))

    def _on_gate(self, record: Record, at_s: float) -> None:
        self.gate.append(
            GateDecision(
                at_s=at_s,
                decision=clean(record.get("decision")).lower(),
                reason=clean(record.get("reason")),
                unsuitable=whole(record.get("unsuitable")),
                allowed=whole(record.get("allowed")),
                waiting_for=_joined(record.get("waiting_for")),
                waited_s=number(record.get("waited_s")),
                downtime_estimate_s=number(record.get("downtime_estimate_s")),
            )
        )

    def _on_released(self, record: Record, at_s: float) -> None:
        self._close_hold(at_s)
        self._released = Released(
            at_s=at_s,
            by=clean(record.get("by")),
            reason=clean(record.get("reason")),
            unsuitable=whole(record.get("unsuitable")),
            held_s=number(record.get("held_s")),
        )
        self._enter(State.SWITCHING, at_s)

    def _moment(self, record: Record, at_s: float) -> float:
        """When the guest stopped or ran: the stamp of ``clock_s`` where it is on a clock we know."""
        stamp = number(record.get("clock_s"))
        if stamp is None or self._origin is None:
            return at_s
        for here in (record.mono_s, record.at.timestamp()):
            if abs(stamp - here) < _SAME_CLOCK_S:
                return max(0.0, at_s + stamp - here)
        return at_s

    def _on_stopped(self, record: Record, at_s: float) -> None:
        self._close_hold(at_s)
        self._stopped_s = self._moment(record, at_s)
        self.stopped_unsuitable = whole(record.get("unsuitable"))
        self._total_at_pause = self.counts[-1].total if self.counts else None
        self._enter(State.SWITCHING, at_s)

    def _on_resumed(self, record: Record, at_s: float) -> None:
        # The other host's clock may be behind; time does not run backwards in a report.
        self._resumed_s = max(self._moment(record, at_s), self._stopped_s or 0.0)
        self._downtime_s = number(record.get("downtime_s"))
        if self._downtime_s is None and self._stopped_s is not None:
            self._downtime_s = max(0.0, self._resumed_s - self._stopped_s)

    def _on_verified(self, record: Record, at_s: float) -> None:
        self._verified = Verified(
            at_s=at_s,
            answering=clean(record.get("answering")),
            how=clean(record.get("how")),
            after_s=number(record.get("after_s")),
        )

    def _on_name(self, record: Record, at_s: float) -> None:
        state = clean(record.get("state")) or "original"
        self._name = Name(name=clean(record.get("name")), state=state, text=clean(record.get("text")))

    def _on_note(self, record: Record, at_s: float) -> None:
        text, hint = clean(record.get("text")), clean(record.get("hint"))
        self.notes.append(Note(at_s=at_s, kind="note", text=text, hint=hint))

    def _on_left(self, record: Record, at_s: float) -> None:
        text = f"left behind: {clean(record.get('kind'))} {clean(record.get('name'))}"
        hint = clean(record.get("reason"))
        self.notes.append(Note(at_s=at_s, kind="left", text=text, hint=hint))

    def _on_user(self, record: Record, at_s: float) -> None:
        text = f"{clean(record.get('by')) or 'somebody'} asked for: {clean(record.get('action'))}"
        self.notes.append(Note(at_s=at_s, kind="user", text=text))

    def _on_end(self, record: Record, at_s: float) -> None:
        ended_well = record.event == "finished"
        self._close_phase(at_s)
        if record.event == "failed":
            self._mark_broken()
        self._close_hold(at_s)
        exit_status = whole(record.get("exit_status"))
        on = None if record.get("on") is None else clean(record.get("on"))
        if record.event == "recovered":
            text = f"recovered: {clean(record.get('text')) or clean(record.get('action'))}"
            self.notes.append(Note(at_s=at_s, kind="recovered", text=text))
            moved = on is not None and on == clean(self._started.get("destination"))
            state = State.FINISHED if moved else State.FAILED
        elif ended_well:
            state = State.FINISHED
        else:
            state = State.ABORTED if exit_status in _ASKED_FOR else State.FAILED
        self._end = End(
            at_s=at_s,
            event=record.event,
            on=on,
            exit_status=exit_status,
            error=clean(record.get("error")),
            what=clean(record.get("what")) or clean(record.get("text")),
            where=clean(record.get("where")),
            cause=clean(record.get("cause"), 2000),
            hint=clean(record.get("hint")),
            reason=clean(record.get("reason")),
        )
        if record.event != "recovered":
            self._summary = record.fields
        self._enter(state, at_s)

    def _busy(self) -> tuple[Busy, ...]:
        """The connections not suitable now, longest first; a change of reason does not reset since."""
        found: list[Busy] = []
        for key, spans in self._lanes.items():
            last = spans[-1] if spans else None
            if last is None or last.end_s is not None or last.verdict == "suitable":
                continue
            since_s = last.start_s
            for index in range(len(spans) - 2, -1, -1):
                if spans[index].verdict == "suitable" or spans[index].end_s != since_s:
                    break
                since_s = spans[index].start_s
            found.append(
                Busy(
                    client=key[0],
                    server=key[1],
                    protocol=self._protocols.get(key, ""),
                    verdict=last.verdict,
                    reason=last.reason,
                    since_s=since_s,
                )
            )
        return tuple(sorted(found, key=lambda busy: busy.since_s))

    def _waiting_for(self, state: State) -> str | None:
        last = self.gate[-1] if self.gate else None
        if state is not State.HOLDING or last is None or last.decision not in {"hold", "escalate"}:
            return None
        return last.waiting_for or last.reason or None

    def _held_s(self) -> float | None:
        for told in (
            number(self._summary.get("held_s")),
            self._released.held_s if self._released else None,
        ):
            if told is not None:
                return told
        if self._hold is None:
            return None
        return (self._last_s if self._hold.end_s is None else self._hold.end_s) - self._hold.start_s

    def status(self, alive: Alive | None = None) -> Status:
        """Where the migration stands at the last record."""
        state, outcome, since_s = self._state, Outcome.RUNNING, self._state_since_s
        pid, pid_started = whole(self._started.get("pid")), self._started.get("pid_started")
        if self._end is not None:
            outcome = {State.FINISHED: Outcome.FINISHED, State.ABORTED: Outcome.ABORTED}.get(
                state, Outcome.FAILED
            )
        elif alive is not None and (pid is None or not alive(pid, pid_started)):
            state, outcome, since_s = State.LOST, Outcome.CRASHED, self._last_s
        summary = self._summary
        downtime_s = number(summary.get("downtime_s"))
        at_pause = whole(summary.get("unsuitable_at_pause"))
        total_s = number(summary.get("total_s"))
        if total_s is None and self._origin is not None:
            total_s = self._last_s
        answering = self._verified.answering if self._verified else None
        started_at: datetime | None = self._origin.at if self._origin else None
        verdicts = [check.verdict for check in self.checks]
        return Status(
            id=clean(self._started.get("id")),
            domain=clean(self._started.get("domain")) or clean(summary.get("domain")),
            source=clean(self._started.get("source")),
            destination=clean(self._started.get("destination")),
            policy=clean(self._started.get("policy")),
            started_at=started_at,
            origin_mono_s=self._origin.mono_s if self._origin else 0.0,
            last_at=self._last.at if self._last else None,
            last_s=self._last_s,
            state=state,
            outcome=outcome,
            state_since_s=since_s,
            phases=tuple(self._phases),
            disks=tuple(self._disks.values()),
            storage_fraction=self._storage_fraction,
            ram=self.ram[-1] if self.ram else None,
            first_pass=self._first_pass,
            hold=self._hold,
            counts=self.counts[-1] if self.counts else None,
            unsuitable=self._busy(),
            gate=self.gate[-1] if self.gate else None,
            waiting_for=self._waiting_for(state),
            checks_ok=verdicts.count("PASS"),
            checks_warn=verdicts.count("WARN"),
            checks_failed=verdicts.count("FAIL"),
            released=self._released,
            stopped_s=self._stopped_s,
            resumed_s=self._resumed_s,
            verified=self._verified,
            name=self._name,
            note=self.notes[-1] if self.notes else None,
            end=self._end,
            total_s=total_s,
            held_s=self._held_s(),
            downtime_s=self._downtime_s if downtime_s is None else downtime_s,
            answering=answering or yes_or_no(summary.get("answering")),
            unsuitable_at_pause=self.stopped_unsuitable if at_pause is None else at_pause,
            total_at_pause=self._total_at_pause,
            sent_bytes=whole(summary.get("sent_bytes")),
            hold_kind=clean(summary.get("hold")) or (self._hold.kind if self._hold else "") or None,
            pid=pid,
            pid_started=pid_started,
        )

    def lanes(self) -> tuple[Lane, ...]:
        """Every connection's life so far."""
        return tuple(
            Lane(client=key[0], server=key[1], protocol=self._protocols.get(key, ""), spans=tuple(spans))
            for key, spans in self._lanes.items()
        )

    def options(self) -> dict[str, str]:
        """The options of the call, flat, as text."""
        shown: dict[str, str] = {}
        options = self._started.get("options")
        for name, value in (options if isinstance(options, Mapping) else {}).items():
            if isinstance(value, Mapping):
                shown |= {f"{clean(name)}.{clean(key)}": clean(inner) for key, inner in value.items()}
            else:
                shown[clean(name)] = clean(value)
        for name in ("source_uri", "dest_uri", "uuid", "reason"):
            if self._started.get(name):
                shown[name] = clean(self._started[name])
        return shown

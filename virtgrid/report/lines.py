"""The same news as plain lines, for pipes and logs: one per change, one every five seconds between."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from virtgrid.core.events import Record
from virtgrid.core.units import format_duration
from virtgrid.report.fold import Fold
from virtgrid.report.model import Outcome, State, Status, clean, number
from virtgrid.report.words import busy_text, checks_text, hold_facts, ram_facts, storage_facts, verdict

#: A long phase says something at least this often.
EVERY_S: Final = 5.0


def progress(status: Status, now_s: float) -> str:
    """Where it is, in a line."""
    if status.state is State.STORAGE and status.disks:
        return f"storage copy: {', '.join(storage_facts(status))}"
    if status.state is State.PRECOPY and status.ram:
        return f"precopy: {', '.join(ram_facts(status.ram))}"
    if status.state is State.HOLDING and status.hold:
        told = f"holding: {', '.join(hold_facts(status, now_s))}"
        if status.unsuitable:
            return f"{told}; longest: {busy_text(status.unsuitable[0])}"
        return f"{told}; waiting for {status.waiting_for}" if status.waiting_for else told
    phase = status.phases[-1] if status.phases else None
    if phase is None:
        return str(status.state)
    return f"{phase.name}: {format_duration(max(0.0, now_s - phase.start_s))} so far"


def _news(record: Record, status: Status) -> str | None:
    """The line an event deserves at once, or None."""
    get = record.get
    match record.event:
        case "started":
            route = f"{status.domain}: {status.source} → {status.destination}"
            return f"{route}, policy {status.policy}, {status.id}"
        case "check" if clean(get("verdict")).upper() != "PASS":
            hint = f" (hint: {clean(get('hint'))})" if get("hint") else ""
            return f"check {clean(get('name'))}: {clean(get('verdict'))}: {clean(get('text'))}{hint}"
        case "phase":
            text = clean(get("text"))
            name = clean(get("phase"))
            if name == "prepare" and checks_text(status):
                return f"prepare{': ' + text if text else ''} (checks: {checks_text(status)})"
            return f"{name}: {text}" if text else name
        case "hold":
            return f"hold: {clean(get('kind'))} ({clean(get('text'))})"
        case "hold_lost":
            return f"the hold was lost: {clean(get('text'))}"
        case "released":
            return f"released by {clean(get('by'))}: {clean(get('reason'))}"
        case "stopped":
            return "guest stopped on the source"
        case "flip" if get("state") == "flipped":
            after_s = number(get("after_s")) or 0.0
            when = f"{format_duration(abs(after_s))} {'after' if after_s >= 0 else 'before'} the stop"
            return f"frames: {clean(get('text'))}, since {when}"
        case "flip" if get("state") in ("draining", "given back", "put back", "lost"):
            return f"frames: {clean(get('text'))}"
        case "share" if get("state") in ("set", "off"):
            return f"link: {clean(get('text'))}"
        case "resumed":
            took = f" after {format_duration(status.downtime_s)}" if status.downtime_s is not None else ""
            return f"guest runs on {status.destination}{took}"
        case "cure":
            return f"guest silent; {clean(get('tried'))}: {clean(get('how'))}"
        case "verified":
            return f"guest answering: {clean(get('answering'))} ({clean(get('how'))})"
        case "name_changed":
            return clean(get("text"))
        case "note":
            hint = f" (hint: {clean(get('hint'))})" if get("hint") else ""
            return f"{clean(get('text'))}{hint}"
        case "left":
            return f"left behind: {clean(get('kind'))} {clean(get('name'))}: {clean(get('reason'))}"
        case "user":
            return f"asked for: {clean(get('action'))}"
        case "finished" | "failed" | "recovered":
            return verdict(status)
    return None


class PlainLines:
    """A journal's listener that writes lines: ``PlainLines(print)``.

    Call ``tick`` at least every few seconds, so that a silent step says something as well.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
        every_s: float = EVERY_S,
    ) -> None:
        self._write = write
        self._monotonic_s = monotonic_s
        self._every_s = every_s
        self._fold = Fold()
        self._told_s = 0.0

    def on_record(self, record: Record) -> None:
        """Take a record; write the line it deserves, if any."""
        self._fold.add(record)
        now_s = self._fold.seconds(record)
        # Status walks all lanes: not for each of the thousands of connection events.
        if record.event in {"connection", "connections", "ram", "storage", "gate"}:
            self._progress(now_s)
        elif line := _news(record, self._fold.status()):
            self._say(line, now_s)

    def tick(self) -> None:
        """Say where it is when nothing was said for a while."""
        status = self._fold.status()
        if status.id:
            self._progress(self._monotonic_s() - status.origin_mono_s)

    def _progress(self, now_s: float) -> None:
        if now_s - self._told_s < self._every_s:
            return
        status = self._fold.status()
        if status.outcome is Outcome.RUNNING:
            self._say(progress(status, now_s), now_s)

    def _say(self, line: str, now_s: float) -> None:
        self._told_s = now_s
        minutes, seconds = divmod(max(0.0, now_s), 60)
        self._write(f"{int(minutes):02d}:{seconds:04.1f} {line}")

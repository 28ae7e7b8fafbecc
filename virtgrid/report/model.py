"""What a journal says, as frozen data: the status at one moment, and the histories behind it.

All times ending in ``_s`` on these classes are seconds since the journal's first record unless
they say otherwise; durations are seconds, sizes bytes, rates bytes per second.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any


def clean(value: object, limit: int = 400) -> str:
    """Text from a journal, safe to show: no control, format or surrogate characters, no endless lines.

    Reasons and names may come from the wire or from a guest's owner; an escape sequence in
    them must not reach a terminal, nor a bidirectional override a report.
    """
    text = value if isinstance(value, str) else "" if value is None else str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isascii() and text.isprintable():
        return text
    return "".join("�" if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else c for c in text)


def number(value: object) -> float | None:
    """A number from a journal, or None."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def whole(value: object) -> int | None:
    """A whole number from a journal, or None."""
    read = number(value)
    return None if read is None else int(read)


def yes_or_no(value: object) -> str | None:
    """An answer that may stand as a word or as a truth value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean(value) or None


class State(StrEnum):
    """Where a migration stands, in the words of ``virtgrid migration list``."""

    PREPARING = "preparing"
    STORAGE = "copying storage"
    PRECOPY = "precopy"
    HOLDING = "holding"
    SWITCHING = "switching"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"
    LOST = "lost"  # no end in the journal, and the process that wrote it is gone


class Outcome(StrEnum):
    """How it ended, if it did."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """A phase; end_s is None while it lasts. broken: the migration ended badly in this phase."""

    name: str
    start_s: float
    end_s: float | None
    text: str = ""
    broken: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One preflight check; verdict is PASS, WARN or FAIL."""

    name: str
    verdict: str
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSample:
    """One disk's mirror at one moment."""

    at_s: float
    disk: str
    copied_bytes: int
    total_bytes: int
    ready: bool
    bytes_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RamSample:
    """Memory precopy at one moment."""

    at_s: float
    iteration: int
    remaining_bytes: int
    sent_bytes: int
    total_bytes: int | None = None
    dirty_bytes_s: float | None = None
    speed_bytes_s: float | None = None
    limit_bytes_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Clamp:
    """QEMU's bandwidth was set on purpose."""

    at_s: float
    limit_bytes_s: float
    mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CountSample:
    """How many connections the guest has; unknown ones count as unsuitable."""

    at_s: float
    total: int
    suitable: int
    unknown: int

    @property
    def unsuitable(self) -> int:
        return max(0, self.total - self.suitable)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSpan:
    """A time in which a connection kept one verdict; end_s is None while it lasts."""

    verdict: str
    start_s: float
    end_s: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One connection's life. A port used again after a close continues the same lane."""

    client: str
    server: str
    protocol: str
    spans: tuple[LaneSpan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """A connection that is not suitable now."""

    client: str
    server: str
    protocol: str
    verdict: str
    reason: str
    since_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GateDecision:
    """What the gate said, when its decision or reason changed."""

    at_s: float
    decision: str
    reason: str
    unsuitable: int | None = None
    allowed: int | None = None
    waiting_for: str = ""
    waited_s: float | None = None
    downtime_estimate_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """The interval in which the switchover was held; end_s is None while it lasts."""

    kind: str
    text: str
    start_s: float
    end_s: float | None
    max_s: float | None = None
    then: str = ""
    lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The switchover was let go."""

    at_s: float
    by: str
    reason: str
    unsuitable: int | None = None
    held_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """Whether the guest answered at the destination."""

    at_s: float
    answering: str
    how: str
    after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """The name clients find the guest by. state: original, lowered, moved or settled; text: a sentence."""

    name: str
    state: str = "original"
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something a person should know; kind is note, user, left, hold_lost or recovered."""

    at_s: float
    kind: str
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The last word: finished, failed or recovered. on is where the domain runs; None: unknown."""

    at_s: float
    event: str
    on: str | None
    exit_status: int | None
    error: str = ""
    what: str = ""
    where: str = ""
    cause: str = ""
    hint: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A migration as it stands at the last record read.

    first_pass and storage_fraction only ever grow, so that no bar runs backwards.
    unsuitable: the connections that count against stopping now, longest first.
    """

    id: str
    domain: str
    source: str
    destination: str
    policy: str
    started_at: datetime | None
    origin_mono_s: float
    last_at: datetime | None
    last_s: float
    state: State
    outcome: Outcome
    state_since_s: float
    phases: tuple[PhaseSpan, ...] = ()
    disks: tuple[DiskSample, ...] = ()
    storage_fraction: float | None = None
    ram: RamSample | None = None
    first_pass: float | None = None
    hold: Hold | None = None
    counts: CountSample | None = None
    unsuitable: tuple[Busy, ...] = ()
    gate: GateDecision | None = None
    waiting_for: str | None = None
    checks_ok: int = 0
    checks_warn: int = 0
    checks_failed: int = 0
    released: Released | None = None
    stopped_s: float | None = None
    resumed_s: float | None = None
    verified: Verified | None = None
    name: Name | None = None
    note: Note | None = None
    end: End | None = None
    total_s: float | None = None
    held_s: float | None = None
    downtime_s: float | None = None
    answering: str | None = None
    unsuitable_at_pause: int | None = None
    total_at_pause: int | None = None
    sent_bytes: int | None = None
    hold_kind: str | None = None
    pid: int | None = None
    pid_started: object = None

    @property
    def exit_status(self) -> int | None:
        return self.end.exit_status if self.end else None

    @property
    def on(self) -> str | None:
        """Where the domain runs, as far as the journal can tell; None when it cannot."""
        if self.end is not None:
            return self.end.on
        if self.resumed_s is not None:
            return self.destination
        return None if self.stopped_s is not None or self.outcome is Outcome.CRASHED else self.source

    def four_numbers(self) -> dict[str, Any]:
        """Total, held, guest stopped, answering: what a report's header shows."""
        return {
            "total_s": self.total_s,
            "held_s": self.held_s,
            "downtime_s": self.downtime_s,
            "answering": self.answering,
        }

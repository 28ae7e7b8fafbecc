"""The sentences about a migration: one place, so that view, lines, list and report say the same."""

from __future__ import annotations

from virtgrid.core.units import format_duration, format_rate, format_size
from virtgrid.report.model import Busy, Outcome, RamSample, Status

#: A rate below this says "nothing"; a line that trembles between 0 and 3 B/s says nothing better.
_QUIET_BYTES_S = 1024.0


def count(number: int, noun: str) -> str:
    """``1 connection``, ``3 connections``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def connections_of(status: Status) -> str | None:
    """``12 of 14 connections suitable``, or None when nobody counts."""
    if status.counts is None:
        return None
    if status.counts.total == 0:
        return "no connections"
    return f"{status.counts.suitable} of {count(status.counts.total, 'connection')} suitable"


def storage_facts(status: Status) -> list[str]:
    """How far the disks are: ``1.2 GiB of 8.0 GiB``, ``112 MiB/s``."""
    if not status.disks:
        return []
    total = sum(d.total_bytes for d in status.disks)
    if all(d.ready for d in status.disks):
        return [f"{format_size(total)} in sync"]
    copied = sum(d.total_bytes if d.ready else d.copied_bytes for d in status.disks)
    rates = [d.bytes_s for d in status.disks if d.bytes_s is not None and not d.ready]
    facts = [f"{format_size(copied)} of {format_size(total)}"]
    if rates:
        facts.append(format_rate(sum(rates)))
        if sum(rates) > _QUIET_BYTES_S and copied < total:
            facts.append(f"{format_duration(max(1.0, (total - copied) / sum(rates)))} left")
    return facts


def ram_facts(ram: RamSample | None) -> list[str]:
    """``iteration 6``, ``remaining 3.1 MiB``, ``dirty 9.2 MiB/s``, ``speed 112 MiB/s``."""
    if ram is None:
        return []
    facts = [f"iteration {ram.iteration}", f"remaining {format_size(ram.remaining_bytes)}"]
    if ram.dirty_bytes_s is not None:
        facts.append(f"dirty {format_rate(ram.dirty_bytes_s)}")
    if ram.speed_bytes_s is not None:
        facts.append(f"speed {format_rate(ram.speed_bytes_s)}")
    return facts


def hold_facts(status: Status, now_s: float) -> list[str]:
    """``4.2 s of 30 s``, the policy, ``12 of 14 connections suitable``."""
    hold = status.hold
    if hold is None:
        return []
    held = format_duration(max(0.0, (hold.end_s if hold.end_s is not None else now_s) - hold.start_s))
    limit = f" of {short_duration(hold.max_s)}" if hold.max_s is not None else ""
    facts = [f"{held}{limit}"]
    if status.policy:
        facts.append(status.policy)
    if connections := connections_of(status):
        facts.append(connections)
    return facts


def short_duration(seconds: float) -> str:
    """A configured time as a person wrote it: ``30 s``, not ``30.0 s``."""
    return f"{seconds:.0f} s" if 1 <= seconds < 60 and seconds == round(seconds) else format_duration(seconds)


def checks_text(status: Status) -> str:
    """``12 ok, 1 warning``."""
    parts = [f"{status.checks_ok} ok"] if status.checks_ok else []
    if status.checks_warn:
        parts.append(count(status.checks_warn, "warning"))
    if status.checks_failed:
        parts.append(f"{status.checks_failed} failed")
    return ", ".join(parts)


def busy_text(busy: Busy) -> str:
    """One unsuitable connection in a line: protocol, client, why."""
    reason = busy.reason or busy.verdict
    if busy.verdict == "unknown" and "unknown" not in reason:
        reason = f"unknown: {reason}"
    return f"{busy.protocol} {busy.client}  {reason}".strip()


def position(status: Status) -> str:
    """Where the domain runs: ``web1 runs on hostB``."""
    domain = status.domain or "the domain"
    if status.on is not None:
        return f"{domain} runs on {status.on}"
    if status.source and status.destination:
        return f"{domain} may be on {status.source} or {status.destination}"
    return f"where {domain} runs is not known"


def verdict(status: Status) -> str:
    """What a person wants to know first, in one or two sentences."""
    if status.outcome is Outcome.RUNNING:
        waiting = f", waiting for {status.waiting_for}" if status.waiting_for else ""
        return f"{position(status)}; the migration is under way ({status.state}{waiting})."
    if status.outcome is Outcome.CRASHED:
        hint = f"virtgrid migration recover {status.id}"
        return f"{position(status)}: the program that migrated it is gone. Run: {hint}"
    end = status.end
    facts: list[str] = []
    if status.downtime_s is not None:
        facts.append(f"guest stopped {format_duration(status.downtime_s)}")
    if status.held_s:
        facts.append(f"held {format_duration(status.held_s)}")
    if status.unsuitable_at_pause is not None:
        among = status.total_at_pause
        told = (
            f"{status.unsuitable_at_pause} of {among}"
            if among is not None
            else f"{status.unsuitable_at_pause}"
        )
        noun = (
            "connection" if (status.unsuitable_at_pause if among is None else among) == 1 else "connections"
        )
        facts.append(
            "no connections at the pause" if among == 0 else f"{told} {noun} unsuitable at the pause"
        )
    if status.outcome is Outcome.FINISHED:
        if status.answering == "no":
            facts.append("the guest does NOT answer")
        if status.name is not None and status.name.state not in ("moved", "settled"):
            facts.append(f"{status.name.name} was NOT pointed to it")
        joined = "; ".join(facts)
        return f"{position(status)}. {joined[:1].upper()}{joined[1:]}." if joined else f"{position(status)}."
    why = (end.what if end else "").rstrip(".") or "The migration ended"
    asked = "aborted" if status.outcome is Outcome.ABORTED else "failed"
    joint = "" if why.startswith(asked) else f"{asked}: "
    return f"{position(status)}. Migration {joint}{why}."

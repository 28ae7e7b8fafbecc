"""A migration as an object for other programs: ``--json`` and the REST interface say the same. Pure."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from virtgrid.report.model import Outcome, Status
from virtgrid.report.words import verdict


def for_s(status: Status, now: datetime) -> float | None:
    """How long it has been in this state, by UTC: the journal may be from before a reboot."""
    if status.outcome is not Outcome.RUNNING or status.started_at is None:
        return None
    return max(0.0, (now - status.started_at).total_seconds() - status.state_since_s)


def waiting(status: Status, now: datetime) -> dict[str, Any] | None:
    """For whom a held migration waits, for ``--json``; None when it is not held."""
    if status.waiting_for is None or status.hold is None:
        return None
    counts = status.counts
    return {
        "text": status.waiting_for,
        "reason": status.gate.reason if status.gate else None,
        "suitable": counts.suitable if counts else None,
        "total": counts.total if counts else None,
        "allowed": status.gate.allowed if status.gate else None,
        "hold_s": for_s(status, now),
        "hold_max_s": status.hold.max_s,
        "then": status.hold.then or None,
    }


def as_object(status: Status, path: Path, now: datetime) -> dict[str, Any]:
    """One migration for ``--json``: of ``list`` and ``show`` alike."""
    end = status.end
    return {
        "id": status.id,
        "domain": status.domain,
        "source": status.source,
        "destination": status.destination,
        "policy": status.policy,
        "state": status.state,
        "outcome": status.outcome,
        "for_s": for_s(status, now),
        "waiting_for": waiting(status, now),
        "on": status.on,
        "started_at": status.started_at,
        "hold": status.hold_kind,
        **status.four_numbers(),
        "name": {"name": status.name.name, "state": status.name.state} if status.name else None,
        "unsuitable_at_pause": status.unsuitable_at_pause,
        "sent_bytes": status.sent_bytes,
        "exit_status": status.exit_status,
        "error": end.error or None if end else None,
        "what": end.what or None if end else None,
        "cause": end.cause or None if end else None,
        "hint": end.hint or None if end else None,
        "verdict": verdict(status),
        "journal": path,
    }

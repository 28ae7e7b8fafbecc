"""The vocabulary of the journal: every event's name, its fields and what it means.

The table is the contract between the driver, which writes events, and everybody who reads
them: live view, report, ``--json``, metrics, tests. The writer checks against it, so that a
field nobody documented cannot slip in. docs/reference/journal.md is generated from it.

Units are in the names: ``_s`` seconds, ``_bytes``, ``_bytes_s`` bytes per second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class EventType:
    """One row of the vocabulary: what it means, the fields it must have, those it may have."""

    meaning: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()


def _row(meaning: str, required: str = "", optional: str = "") -> EventType:
    return EventType(meaning, frozenset(required.split()), frozenset(optional.split()))


EVENTS: Final[Mapping[str, EventType]] = {
    "started": _row(
        "A migration begins; nothing has been touched yet.",
        "id domain uuid source destination dest_uri policy",
        "source_uri options reason pid pid_started",
    ),
    "check": _row("One preflight check; verdict is PASS, WARN or FAIL.", "name verdict text", "hint"),
    "estimate": _row(
        "What the plan expects.", "storage_s memory_s", "storage_bytes memory_bytes bandwidth_bytes_s"
    ),
    "phase": _row(
        "A phase begins: preflight, prepare, storage, precopy, hold, release, switchover, verify, cleanup.",
        "phase",
        "text",
    ),
    "limits": _row(
        "The domain's migration limits as they were before we changed them; put back at the end.",
        "downtime_s",
    ),
    "created": _row(
        "We made something on the destination that a failure must remove.", "kind name", "path pool"
    ),
    "removed": _row("It was removed again.", "kind name", "path reason"),
    "left": _row("It could not be removed; `migration recover` will try again.", "kind name", "path reason"),
    "storage": _row("Progress of one disk's mirror.", "disk copied_bytes total_bytes ready", "bytes_s"),
    "ram": _row(
        "Progress of memory precopy. speed is what was sent lately, limit what QEMU was told.",
        "iteration remaining_bytes sent_bytes",
        "total_bytes dirty_bytes_s speed_bytes_s limit_bytes_s since_sync_s",
    ),
    "clamp": _row(
        "QEMU's bandwidth was set on purpose, to land, hold or refresh.",
        "limit_bytes_s mode",
        "remaining_bytes",
    ),
    "hold": _row(
        "The switchover is held; kind is strict, tickled or best-effort, and by what that was told.",
        "kind text",
        "remaining_bytes drip_bytes_s max_s then",
    ),
    "hold_lost": _row("QEMU completed although it was held.", "text"),
    "connections": _row("The guest's connections, counted.", "total suitable unsuitable unknown"),
    "connection": _row(
        "One connection's verdict changed, at seen_s of the writer's monotonic clock; verdict is suitable,"
        " unsuitable, unknown or closed.",
        "client server protocol verdict reason",
        "state seen_s",
    ),
    "gate": _row(
        "The gate decided: hold, release, escalate or abort; written when decision or reason changes.",
        "decision reason",
        "unsuitable allowed waiting_for until_s waited_s downtime_estimate_s",
    ),
    "flip": _row(
        "Where the guest's frames go in the switchover. state: ready; draining (before the stop);"
        " flipped (they wait at the destination, since after_s from the stop, replayed of them sent again);"
        " given back (it did not stop after the drain) and put back (it goes on here), with so many frames;"
        " settled; off (none: text says why); lost.",
        "state text",
        "bridge port tap mac after_s replayed frames",
    ),
    "share": _row(
        "The link to the destination and the service's part of it. state: set (written before the classes are"
        " made on interface); raised (for the pause); removed; off (no class: text says why).",
        "state text",
        "interface link_bytes_s service_bytes_s migration_bytes_s",
    ),
    "stream": _row(
        "A connection of the migration's. state: bounded (so much may be taken from QEMU and not yet sent;"
        " buffer_bytes: in all, where the kernel's own limit is too small; delay_s there and back); off (not"
        " bounded: text says why).",
        "state text",
        "peer unsent_bytes buffer_bytes delay_s",
    ),
    "released": _row(
        "The switchover was let go; by gate, user, timeout or policy.",
        "by reason",
        "unsuitable remaining_bytes held_s downtime_estimate_s drain_s drain",
    ),
    "stopped": _row("The guest stopped on the source.", "", "clock_s unsuitable counts remaining_bytes"),
    "resumed": _row("The guest runs on the destination.", "", "clock_s downtime_s"),
    "name": _row(
        "The name clients find the guest by: its records as they were and as they shall be; written before"
        " they are changed.",
        "name zone original destination low_ttl_s server key_file",
    ),
    "name_changed": _row(
        "The name's records are in another state: lowered, moved, settled or original.",
        "name state text",
        "took_s",
    ),
    "cure": _row(
        "The guest was silent at the destination: what was tried, and what was seen afterwards.", "tried how"
    ),
    "verified": _row(
        "Whether the guest answers at the destination: yes, no or unknown, and how that was asked. why it is"
        " silent: crashed, paused, gone, unplugged, network, hung or mute.",
        "answering how",
        "after_s why",
    ),
    "user": _row("A person asked for something: release, abort, detach, interrupt.", "action", "by"),
    "note": _row("Something a person should know.", "text", "hint"),
    "finished": _row(
        "The end, well.",
        "domain on exit_status",
        "hold held_s unsuitable_at_pause downtime_s total_s sent_bytes policy reason answering name_state"
        " hint",
    ),
    "failed": _row(
        "The end, not well; `on` says where the domain runs now (null: unknown).",
        "domain on exit_status error what",
        "where cause hint hold held_s unsuitable_at_pause downtime_s total_s sent_bytes policy reason",
    ),
    "recovered": _row("`migration recover` looked on both hosts and acted.", "domain on action text"),
}

#: Events after which nothing more is written (recovered may follow a journal without them).
TERMINAL: Final = frozenset({"finished", "failed", "recovered"})

PHASES: Final = (
    "preflight", "prepare", "storage", "precopy", "hold", "release", "switchover", "verify", "cleanup",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of a journal.

    at: UTC. mono_s: seconds on the writer's monotonic clock (comparable within one host boot).
    """

    at: datetime
    mono_s: float
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    v: int = SCHEMA_VERSION

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)

    def as_dict(self) -> dict[str, Any]:
        """The line as it stands in the file."""
        return {
            "v": self.v,
            "at": self.at.isoformat(timespec="milliseconds"),
            "mono_s": round(self.mono_s, 6),
            "event": self.event,
            **self.fields,
        }


def check_fields(event: str, fields: Mapping[str, Any]) -> None:
    """Raise ValueError when an event is not in the vocabulary or its fields do not fit."""
    row = EVENTS.get(event)
    if row is None:
        raise ValueError(f"unknown event {event!r}")
    missing = row.required - fields.keys()
    unknown = fields.keys() - row.required - row.optional
    if missing or unknown:
        raise ValueError(f"event {event!r}: missing {sorted(missing)}, undocumented {sorted(unknown)}")

"""docs/reference/journal.md from the vocabulary: ``python -m virtgrid.report.vocabulary > FILE``."""

from __future__ import annotations

from virtgrid.core.events import EVENTS, PHASES, SCHEMA_VERSION, TERMINAL

_HEAD = f"""# The journal

Every migration keeps a journal: `ID.jsonl` in `migrations/` below the state directory, which is
`$VIRTGRID_STATE_DIR` if set, else `/var/lib/virtgrid` for root, else `$XDG_STATE_HOME/virtgrid`.
It is a file of JSON lines, appended to and flushed event by event; the live view, `virtgrid
migration list`, `show` and `report`, recovery and `virtgrid migrate --json` all read it.

This page is generated from `virtgrid/core/events.py`; a test keeps it current.

Every line has

| field | meaning |
|---|---|
| `v` | version of the vocabulary, now {SCHEMA_VERSION}; a reader of version n reads n−1 |
| `at` | UTC, ISO 8601 with milliseconds |
| `mono_s` | seconds on the writer's monotonic clock: durations are differences of these |
| `event` | one of the names below |

and the fields of its event. Units are in the names: `_s` seconds, `_bytes`, `_bytes_s` bytes per
second. Later versions may add events and optional fields: a reader passes over what it does not
know. A writer killed in the middle may leave half a last line; a reader leaves it out.

"""


def journal_markdown() -> str:
    """The reference page of the journal."""
    lines = ["| event | meaning | fields | fields it may have |", "|---|---|---|---|"]
    for name, row in EVENTS.items():
        required, optional = (
            ", ".join(f"`{field}`" for field in sorted(fields)) for fields in (row.required, row.optional)
        )
        meaning = row.meaning.replace("|", "\\|")
        lines.append(f"| `{name}` | {meaning} | {required} | {optional} |")
    phases = ", ".join(f"`{phase}`" for phase in PHASES)
    ends = ", ".join(f"`{name}`" for name in sorted(TERMINAL))
    tail = [
        "",
        f"The phases, in their order: {phases}.",
        "",
        f"A journal ends with one of {ends}; `recovered` may also follow one that ended without them.",
        "A journal with no end whose writer (`pid`, `pid_started` in `started`) is gone is shown as `lost`.",
    ]
    return _HEAD + "\n".join(lines + tail) + "\n"


if __name__ == "__main__":
    print(journal_markdown(), end="")

"""The journal: one JSON-lines file per migration, and the record of what happened.

Live view, report, metrics, recovery and tests read this same file. It is appended to and
flushed line by line, so a controller killed with -9 leaves all but perhaps its last line;
readers drop a torn last line and refuse a torn line elsewhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

from virtgrid.core.clock import Clock
from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.core.events import SCHEMA_VERSION, Record, check_fields

_ID: Final = re.compile(r"[0-9]{8}T[0-9]{6}-[A-Za-z0-9_.+:-]{1,200}")
_LINE_LIMIT_BYTES: Final = 1 << 20

Listener = Callable[[Record], None]


def state_dir() -> Path:
    """Where journals live: $VIRTGRID_STATE_DIR, else /var/lib/virtgrid as root, else XDG."""
    if configured := os.environ.get("VIRTGRID_STATE_DIR"):
        return Path(configured)
    if os.geteuid() == 0:
        return Path("/var/lib/virtgrid")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "virtgrid"


def migrations_dir() -> Path:
    """Where the journals of migrations live."""
    return state_dir() / "migrations"


def new_id(now: datetime, domain: str) -> str:
    """``20261122T014412-web1``; characters a file name should not have become ``_``."""
    return f"{now:%Y%m%dT%H%M%S}-{re.sub(r'[^A-Za-z0-9_.+-]', '_', domain)[:180]}"


class Journal:
    """Writes one journal. Every line is flushed to the kernel; the terminal ones to the disk."""

    def __init__(self, path: Path, clock: Clock, *, append: bool = False) -> None:
        self.path = path
        self._clock = clock
        self._listeners: list[Listener] = []
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        # Exclusive: two migrations in the same second get two journals, never one mixed one.
        # Only recovery appends, to a journal whose writer is gone.
        self._file: TextIO = path.open("a" if append else "x", encoding="utf-8")

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` with every record as it is written, in this process."""
        self._listeners.append(listener)

    def write(self, event: str, *, sync: bool = False, **fields: Any) -> Record:
        """Append one event. ``sync`` also waits for the disk: for what recovery depends on."""
        check_fields(event, fields)
        record = Record(at=self._clock.utc(), mono_s=self._clock.monotonic_s(), event=event, fields=fields)
        self._file.write(json.dumps(record.as_dict(), ensure_ascii=False, separators=(",", ":")) + "\n")
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())
        for listener in self._listeners:
            listener(record)
        return record

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse_line(line: str) -> Record:
    """One line of a journal; ValueError when it is none we can read."""
    if len(line) > _LINE_LIMIT_BYTES:
        raise ValueError("line too long")
    data = json.loads(line)
    if not isinstance(data, dict):
        raise ValueError("not an object")
    version = data.pop("v")
    if not isinstance(version, int) or not SCHEMA_VERSION - 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"version {version} of the journal is not one this program reads")
    try:
        at = datetime.fromisoformat(data.pop("at")).astimezone(UTC)
    except OverflowError as error:  # the first or last hours of the calendar
        raise ValueError("a time outside of the calendar") from error
    return Record(
        at=at, mono_s=float(data.pop("mono_s")), event=str(data.pop("event")), fields=data, v=version
    )


def read(path: Path) -> list[Record]:
    """All records of a journal, oldest first. A torn last line is left out."""
    records: list[Record] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(parse_line(line))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no newline after it: the writer died in the middle
                break
            raise RefusedError(f"{path}:{number}: not a line of a journal", cause=str(error)) from error
    return records


class Follower:
    """Reads a journal while it is written: each ``poll`` gives the complete new lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open(encoding="utf-8", errors="replace")
        self._rest = ""

    def poll(self) -> list[Record]:
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        return [parse_line(line) for line in lines if line]

    def close(self) -> None:
        self._file.close()


def find(reference: str, directory: Path | None = None) -> Path:
    """The journal of a migration by id, or the newest one of a domain by its name.

    Errors: NotFoundError; a reference can never leave the directory.
    """
    directory = directory or migrations_dir()
    if _ID.fullmatch(reference) and (path := directory / f"{reference}.jsonl").is_file():
        return path
    for path in newest_first(directory):
        if path.stem.partition("-")[2] == reference:
            return path
    raise NotFoundError(
        f"no migration '{reference}' in {directory}", hint="virtgrid migration list shows what is recorded"
    )


def newest_first(directory: Path | None = None) -> Iterator[Path]:
    """All journals, newest first."""
    directory = directory or migrations_dir()
    if directory.is_dir():
        yield from sorted(directory.glob("*.jsonl"), reverse=True)

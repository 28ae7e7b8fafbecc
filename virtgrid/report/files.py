"""Journals on disk, read for a list or a report, and whether their writers still live."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from virtgrid.core import journal
from virtgrid.core.errors import RefusedError
from virtgrid.core.events import Record
from virtgrid.core.process import process_started
from virtgrid.report.fold import Alive, Fold
from virtgrid.report.model import Outcome
from virtgrid.report.timeline import Timeline

#: The last lines of a journal, an end among them if it has one, fit in here.
_TAIL_BYTES: Final = 32 << 10


def writer_alive(pid: int, pid_started: object) -> bool:
    """Whether the process that wrote a journal still runs; the liveness check for Timeline and Fold."""
    started = process_started(pid)
    return started is not None and (pid_started is None or str(pid_started) == str(started))


def load(path: Path, alive: Alive | None = writer_alive) -> Timeline:
    """A journal's whole history. RefusedError when the file is no journal."""
    told = _read(path, alive)
    # A writer that ended between the reading and the question looks like one that died: read again.
    return _read(path, alive) if told.outcome is Outcome.CRASHED else told


def _read(path: Path, alive: Alive | None) -> Timeline:
    records = journal.read(path)
    if not records:
        raise RefusedError(f"{path} is empty: nothing was recorded")
    return Timeline.from_records(records, alive)


def brief(path: Path) -> list[Record]:
    """Enough of a journal to list it: all of it, or first and last line when it ended by itself."""
    with path.open("rb") as file:
        first = file.readline(_TAIL_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    lines = tail.split(b"\n")
    if size > _TAIL_BYTES and first.endswith(b"\n") and len(lines) > 2 and not lines[-1]:
        try:
            records = [journal.parse_line(line.decode()) for line in (first, lines[-2])]
        except (ValueError, KeyError, TypeError):
            return journal.read(path)
        if records[0].event == "started" and records[1].event in {"finished", "failed"}:
            return records
    return journal.read(path)


def briefs(directory: Path | None = None) -> Iterator[tuple[Path, Fold | RefusedError]]:
    """All journals, newest first, each folded or, when it cannot be read, with the reason."""
    for path in journal.newest_first(directory):
        fold = Fold()
        try:
            records = brief(path)
        except RefusedError as error:
            yield path, error
            continue
        except OSError as error:
            yield path, RefusedError(f"{path} cannot be read", cause=error.strerror)
            continue
        for record in records:
            fold.add(record)
        if records:
            yield path, fold

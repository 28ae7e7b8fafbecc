"""The journals of a host's migrations, kept folded: of those that run only what is new is read.

Read by one thread at a time. A journal that has ended is read once, from its first and last lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from virtgrid.core import journal
from virtgrid.core.errors import RefusedError
from virtgrid.report.files import brief, writer_alive
from virtgrid.report.fold import Fold
from virtgrid.report.model import Outcome, Status

#: Older ones are on the disk and in ``virtgrid migration list``.
SHELF_MAX: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A journal, and where its migration stands; or why it cannot be read."""

    path: Path
    status: Status | None
    why: str = ""


class Ended(NamedTuple):
    """What is counted of a migration that ended."""

    outcome: Outcome
    downtime_s: float | None
    total_s: float | None


def ended(status: Status) -> Ended:
    """What is counted of it."""
    return Ended(status.outcome, status.downtime_s, status.total_s)


class _Reading:
    """A journal on its way: from the disk to a status."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fold = Fold()
        self._follower = journal.Follower(path)

    def poll(self) -> Status:
        """Errors: ValueError, KeyError, TypeError: a line of it is none."""
        for record in self._follower.poll():
            self._fold.add(record)
        return self._fold.status(writer_alive)

    def close(self) -> None:
        self._follower.close()


class Shelf:
    """Use ``look`` as often as needed; ``close`` at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ended: dict[Path, tuple[tuple[int, int], Seen]] = {}
        self._reading: dict[Path, _Reading] = {}
        #: Whether the last look left older ones out.
        self.more = False
        #: How those ended that are no longer on the shelf: a counter must not run backwards.
        self.gone: list[Ended] = []

    def look(self) -> list[Seen]:
        """Where all stand now, newest first."""
        paths = list(islice(journal.newest_first(self._directory), SHELF_MAX + 1))
        self.more = len(paths) > SHELF_MAX
        paths = paths[:SHELF_MAX]
        for path in set(self._reading) - set(paths):
            self._reading.pop(path).close()
        for path in set(self._ended) - set(paths):
            _, seen = self._ended.pop(path)
            if seen.status is not None:
                self.gone.append(ended(seen.status))
        return list(self._each(paths))

    def _each(self, paths: list[Path]) -> Iterator[Seen]:
        for path in paths:
            try:
                found = path.stat()
                stamp = (found.st_size, found.st_mtime_ns)
                known = self._ended.get(path)
                if known is not None and known[0] == stamp:
                    yield known[1]
                    continue
                seen = self._look_at(path)
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError as error:
                yield Seen(path=path, status=None, why=error.strerror or str(error))
                continue
            if seen.status is None or seen.status.outcome is not Outcome.RUNNING:
                # A journal that was cut short may yet be recovered: then it grows, and is read anew.
                self._ended[path] = (stamp, seen)
                self._forget(path)
            yield seen

    def _look_at(self, path: Path) -> Seen:
        reading = self._reading.get(path)
        try:
            if reading is None:
                fold = Fold()
                for record in brief(path):
                    fold.add(record)
                status = fold.status(writer_alive)
                if status.outcome is not Outcome.RUNNING:
                    return Seen(path=path, status=status)
                reading = self._reading[path] = _Reading(path)
            return Seen(path=path, status=reading.poll())
        except (ValueError, KeyError, TypeError, RefusedError) as error:
            self._forget(path)
            return Seen(path=path, status=None, why=str(error))

    def _forget(self, path: Path) -> None:
        reading = self._reading.pop(path, None)
        if reading is not None:
            reading.close()

    def close(self) -> None:
        """Let go of all files."""
        for path in list(self._reading):
            with contextlib.suppress(OSError):
                self._forget(path)

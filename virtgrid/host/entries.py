"""The queue on the disk: one file per entry, replaced whole before anything is done about it."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from virtgrid.core.errors import VirtgridError
from virtgrid.core.files import replace_file
from virtgrid.core.journal import state_dir
from virtgrid.host.queue import ENDED, Entry

#: So many that have ended are kept, to be looked at.
KEPT: Final = 200
_LIMIT_BYTES: Final = 64 << 10
_log = logging.getLogger(__name__)


def directory() -> Path:
    return state_dir() / "queue"


class Entries:
    """The files, and what they say."""

    def __init__(self, where: Path | None = None) -> None:
        self.where = where or directory()
        self.where.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._all: dict[str, Entry] = {}
        for path in sorted(self.where.glob("*.json")):
            if (entry := _read(path)) is not None:
                self._all[entry.id] = entry

    def all(self) -> list[Entry]:
        """Oldest first."""
        return sorted(self._all.values(), key=lambda entry: (entry.asked_at_s, entry.id))

    def active(self) -> list[Entry]:
        return [entry for entry in self.all() if entry.state not in ENDED]

    def get(self, id_: str) -> Entry | None:
        return self._all.get(id_)

    def put(self, entry: Entry) -> None:
        """On the disk when this returns. Errors: VirtgridError; then nothing has changed."""
        try:
            replace_file(self._path(entry.id), entry.model_dump_json().encode())
        except OSError as error:
            raise VirtgridError("virtgridd cannot write its queue", cause=str(error)) from error
        self._all[entry.id] = entry
        self._forget()

    def _forget(self) -> None:
        ended = [entry for entry in self.all() if entry.state in ENDED]
        for entry in sorted(ended, key=lambda one: one.since_s)[: max(0, len(ended) - KEPT)]:
            with contextlib.suppress(OSError):
                self._path(entry.id).unlink(missing_ok=True)
            del self._all[entry.id]

    def _path(self, id_: str) -> Path:
        return self.where / f"{id_}.json"


def _read(path: Path) -> Entry | None:
    try:
        entry = Entry.model_validate_json(path.read_bytes()[:_LIMIT_BYTES])
    except (OSError, ValidationError) as error:
        _log.error("%s cannot be read and is left out: %s", path, error)
        return None
    if f"{entry.id}.json" != path.name:
        _log.error("%s is about another entry and is left out", path)
        return None
    return entry

"""Which pilot used a ticket first: one small file per ticket, so that it is good only once whatever dies.

A ticket's window is all it lives; files of tickets that ended long ago are removed at the start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path
from typing import Final

from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages.ticket import Ticket

_KEPT_S: Final = 86400.0
"""After a ticket's end; by then its bearer is refused for that."""


class Claims:
    """The sessions that tickets belong to, below a directory only the CRM enters."""

    def __init__(self, directory: Path) -> None:
        """Errors: RefusedError."""
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in directory.iterdir():
                if path.stat().st_mtime < time.time() - _KEPT_S:
                    path.unlink()
        except OSError as error:
            raise RefusedError(f"used tickets cannot be kept in {directory}", cause=error.strerror) from error

    def claim(self, ticket: Ticket, session: str) -> None:
        """This pilot uses this ticket: the first time, or again. On the disk when it returns.

        Errors: RefusedError when it is another pilot's, or when it cannot be written down.
        """
        final = self._directory / ticket.id
        fresh = self._directory / f".{ticket.id}.{secrets.token_hex(4)}"
        try:
            if not final.exists():
                self._write(fresh, session, ticket.ends_at_s)
                with contextlib.suppress(FileExistsError):
                    os.link(fresh, final)
                fresh.unlink()
                self._sync()
            owner = final.read_text(encoding="ascii")
        except OSError as error:
            raise RefusedError("the ticket's use cannot be written down", cause=error.strerror) from error
        if not secrets.compare_digest(owner, session):
            raise RefusedError("this ticket was used by another pilot")

    def _write(self, path: Path, session: str, ends_at_s: float) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(session)
            file.flush()
            os.utime(descriptor, (ends_at_s, ends_at_s))
            os.fsync(descriptor)

    def _sync(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

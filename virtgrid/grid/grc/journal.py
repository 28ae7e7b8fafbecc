"""The journal of a job: one file of JSON lines, the record that users follow and every view is made from.

A line is in the file before anybody is told. The coordinator that goes on after a kill reads from it
which part of the program's output it has had (``cursor``) and what it has told of each node.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages import job as jobs
from virtgrid.grid.messages.job import PIECE_LIMIT, Finished, JobTold, Journal, NodeTold, SiteTold, Wrote

_LIMIT_BYTES: Final = 128 << 20
"""More is not written: whatever a site sends, it fills no disk."""
_READ_BYTES: Final = 1 << 20

Line = JobTold | NodeTold | SiteTold | Wrote | Finished


class JobJournal:
    """size: where the next line goes. cursor: where the site's output goes on. nodes: sandbox -> what was
    told of it last. finished: the program's end, once it is there. closed: nothing more will be written.
    """

    def __init__(self, path: Path) -> None:
        """Errors: RefusedError."""
        self._path = path
        self.size = self.cursor = 0
        self.nodes: dict[str, tuple[str, str]] = {}
        self.finished: Finished | None = None
        self.closed = False
        self._changed = asyncio.Condition()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = path.open("ab+", buffering=0)
            self._file.seek(0)
            for raw in self._file.read().splitlines(keepends=True):
                if not raw.endswith(b"\n"):
                    break
                self._fold(jobs.JOURNAL_LINE.validate_json(raw))
                self.size += len(raw)
            self._file.truncate(self.size)
        except (OSError, ValueError) as error:
            raise RefusedError(f"the journal {path} cannot be used", cause=str(error)) from error

    def _fold(self, line: Line) -> None:
        if isinstance(line, Wrote | Finished):
            self.cursor = line.cursor
            if isinstance(line, Finished):
                self.finished = line
        elif isinstance(line, NodeTold):
            self.nodes[line.sandbox] = (line.state, line.reason)

    async def write(self, *lines: Line) -> None:
        """Errors: OSError."""
        if lines and self.size < _LIMIT_BYTES:
            data = b"".join(line.model_dump_json().encode() + b"\n" for line in lines)
            self._file.write(data)
            self.size += len(data)
        for line in lines:
            self._fold(line)
        await self._tell()

    async def close(self) -> None:
        """Nothing more will be written."""
        self.closed = True
        self._file.close()
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def follow(self, after: int, wait_s: float) -> Journal:
        """What is there after this place, as soon as there is something."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                while self.size <= after and not self.closed:
                    await self._changed.wait()
        return read(self._path, after, closed=self.closed)


def read(path: Path, after: int, *, closed: bool) -> Journal:
    """Whole lines of a journal's file after a place, some of them."""
    try:
        with path.open("rb") as file:
            file.seek(after)
            data = file.read(PIECE_LIMIT)
            cut = data.rfind(b"\n") + 1
            more = bool(file.read(1)) or cut < len(data)
    except FileNotFoundError:
        return Journal(lines="", next=after, over=closed)
    lines = data[:cut].decode(errors="replace")
    return Journal(lines=lines, next=after + cut, over=closed and not more)

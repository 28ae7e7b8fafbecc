"""What a crew's program has written, kept at its site until the coordinator has it: a file of whole lines.

Each line is a Tell of the first node's pilot. It is in the file before it is acknowledged to the pilot,
and knows its number; so a CRM that was killed in between leaves out what comes a second time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from virtgrid.grid.messages.job import PIECE_LIMIT
from virtgrid.grid.messages.node import Finished, Output, Tell

LIMIT_BYTES: Final = 64 << 20
"""More output than this is not kept: a program that writes for ever must not fill the disk of others."""
_log = logging.getLogger(__name__)


class Spool:
    """size: where the next line goes. last: the number of the last one. finished: the program's end is
    there.
    """

    def __init__(self, path: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path, self._limit = path, limit_bytes
        self.size = self.last = 0
        self.finished = self._full = False
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = path.open("ab+", buffering=0)
        for line in self._lines():
            self.last, self.finished = int(line["number"]), line["kind"] == "finished"
        self._file.truncate(self.size)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Those that are whole; a torn last one was not acknowledged."""
        self._file.seek(0)
        for raw in self._file.read().splitlines(keepends=True):
            if not raw.endswith(b"\n"):
                return
            yield json.loads(raw)
            self.size += len(raw)

    def take(self, number: int, note: Output | Finished) -> None:
        """Keep a note. Errors: OSError."""
        if number <= self.last or self.finished:
            return
        if isinstance(note, Output) and self.size >= self._limit:
            if self._full:
                return
            self._full = True
            words = f"virtgrid: more than {self._limit >> 20} MiB of output; the rest is not kept\n"
            note = Output.of(note.exec, "stderr", words.encode())
        kind: Literal["output", "finished"] = "finished" if isinstance(note, Finished) else "output"
        line = Tell(number=number, kind=kind, body=note.model_dump(mode="json")).model_dump_json()
        data = f"{line}\n".encode()
        self._file.write(data)
        self.size += len(data)
        self.last, self.finished = number, kind == "finished"

    def read(self, after: int) -> tuple[str, int]:
        """Whole lines from there on, some of them, and where the next ones begin."""
        if not 0 <= after < self.size:
            return "", min(after, self.size)
        self._file.seek(after)
        data = self._file.read(min(PIECE_LIMIT, self.size - after))
        data = data[: data.rindex(b"\n") + 1]
        return data.decode(), after + len(data)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self._path.unlink(missing_ok=True)

"""A file in memory without copying it, as long as nobody is about to change it.

A mapping of a file that somebody truncates is no error that could be caught: the kernel ends the process
(SIGBUS). So the kernel is asked for a lease (fcntl(2), F_SETLEASE): it is given while nobody has the file
open for writing, and whoever wants to write or truncate waits until it is given back, for 45 s by default
(/proc/sys/fs/lease-break-time). Whoever reads here asks before every piece whether it is still ``held``.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import stat
from typing import BinaryIO, Final

#: Told when somebody waits; ``held`` knows it as well, and by default this signal does nothing.
_TOLD_BY: Final = signal.SIGURG


class Mapped:
    """A whole file, read from its beginning. view: its bytes."""

    def __init__(self, file: BinaryIO) -> None:
        """Errors: OSError or ValueError when it cannot be mapped, or may be changed any time."""
        number = file.fileno()
        if not stat.S_ISREG(os.fstat(number).st_mode) or file.tell():
            raise ValueError("no regular file at its beginning")
        self._file = file
        fcntl.fcntl(number, fcntl.F_SETSIG, _TOLD_BY)
        fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        # Its size counts from here on: before the lease it could still shrink.
        self.bytes = mmap.mmap(number, 0, prot=mmap.PROT_READ)
        self.view = memoryview(self.bytes)

    def held(self) -> bool:
        """Whether nobody waits to change the file."""
        return fcntl.fcntl(self._file.fileno(), fcntl.F_GETLEASE) == fcntl.F_RDLCK

    def let_go(self, at: int) -> None:
        """Give the lease back, to read on from ``at``. What is in ``view`` is not to be used any more."""
        fcntl.fcntl(self._file.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK)
        self._file.seek(at)


def mapped(file: object) -> Mapped | None:
    """The file in memory; None where it is to be read instead."""
    try:
        return Mapped(file)  # type: ignore[arg-type]  # whatever it is, it says so itself
    except (AttributeError, OSError, ValueError):
        return None

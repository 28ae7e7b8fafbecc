"""A control group (version 2) whose processes can be stopped all at once, unseen by any of them.

Not SIGSTOP: the parent of a stopped process is told (SIGCHLD), and servers act on that; vsftpd's
sessions hang for ever afterwards. A frozen process, as a stopped guest, knows nothing of it. A host
has this hierarchy beside version 1 too; freezing needs no controller.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Final

from virtgrid.core.errors import DeadlineError, RefusedError

_FREEZE_S: Final = 10.0
_PROBE_S: Final = 0.0005


def hierarchy() -> Path | None:
    """Where the version 2 hierarchy is mounted; None when it is not."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            return Path(left.split(" ")[4])
    return None


class Freezer:
    """A control group of its own. Errors: RefusedError when it cannot be made."""

    def __init__(self, name: str) -> None:
        mount = hierarchy()
        if mount is None:
            raise RefusedError("there is no control group hierarchy of version 2 (cgroup2) to freeze with")
        self.directory = mount / name

    def make(self) -> None:
        try:
            self.directory.mkdir(exist_ok=True)
        except OSError as error:
            raise RefusedError(f"no control group can be made in {self.directory.parent}") from error

    def started_in(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        """The command that runs ``argv`` as a member from its first instruction on."""
        procs = self.directory / "cgroup.procs"
        return ("/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(procs), *argv)

    def freeze(self) -> None:
        """Stop every member; returns when none runs any more. Errors: DeadlineError."""
        self._write("1")
        end_s = time.monotonic() + _FREEZE_S
        while "frozen 1" not in (self.directory / "cgroup.events").read_text():
            if time.monotonic() > end_s:
                raise DeadlineError("some processes cannot be frozen")
            time.sleep(_PROBE_S)

    def thaw(self) -> None:
        self._write("0")

    def remove(self) -> None:
        """Once no member is left."""
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _write(self, value: str) -> None:
        (self.directory / "cgroup.freeze").write_text(value)

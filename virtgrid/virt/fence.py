"""A fence round the source's copy of a guest while nobody can say whether the other copy runs.

When QEMU here has sent everything, libvirt tells the destination to run the guest. If the answer to
that is lost (the destination's libvirtd dies, the link breaks), libvirt's client cannot know
whether the guest runs there, and runs it here again: for a few milliseconds' worth of bad luck it
runs twice. libvirt's own comment at that place leaves the case to a lock manager.

The lock is QEMU's own. A QEMU that has completed a migration lets go of its images' locks (block
nodes are inactivated), and has to take them again before it runs the guest (``cont`` activates
them). Whoever holds the byte that says "nobody else may write" in between makes ``cont`` fail: the
guest stays stopped, whole, until the lock is gone. Layout of the lock bytes: QEMU's
block/file-posix.c, 100 + permission for what is used, 200 + permission for what is denied.

Kernel locks vanish with the process that holds them, so a killed driver leaves nothing behind: the
guest is then stopped here and unfenced, and ``migration recover`` looks at both hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterable
from typing import Final

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type whence start len pid
_USES_WRITE: Final = 100 + 1
_DENIES_WRITE: Final = 200 + 1
_POLL_S: Final = 0.001
#: QEMU lets go of its images before it reports "completed"; longer than this nobody waits for it.
_WAIT_S: Final = 2.0


class Fence:
    """Keeps a guest that has left from running here again; see the top of this module.

    images: paths of the guest's writable images on this host. The first one that QEMU locks is
    used; where there is none (block devices, network disks, locking switched off) nothing is fenced
    and libvirt's own behaviour remains. The file is only locked, never read.
    """

    def __init__(self, images: Iterable[str]) -> None:
        self._file: int | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        #: Whether the guest cannot be run here until ``drop``.
        self.held = False
        for image in images:
            file = _open_regular(image)
            if file is not None and _locked(file):
                self._file = file
                return
            if file is not None:
                os.close(file)

    @property
    def possible(self) -> bool:
        return self._file is not None

    def put_up(self, *, unless: Callable[[], bool]) -> None:
        """QEMU has sent everything: lock as soon as it has let go of the image.

        unless: asked last, in a thread; true when the destination cannot have been told to run it.
        """
        if self._file is None or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._wait, args=(unless,), name="fence", daemon=True)
        self._thread.start()

    def _wait(self, unless: Callable[[], bool]) -> None:
        assert self._file is not None
        for _ in range(round(_WAIT_S / _POLL_S)):
            if not _locked(self._file):
                self.held = not unless() and _deny_writing(self._file)
                return
            if self._done.wait(_POLL_S):
                return

    def drop(self) -> None:
        """The guest may run here again, or will never have to; safe to call again."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self._file is not None:
            os.close(self._file)  # and with it the lock
            self._file = None
        self.held = False


def _open_regular(path: str) -> int | None:
    """A descriptor of a regular file, or None. The path comes from a domain's XML: nothing else is opened."""
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
        return None
    finally:
        os.close(handle)


def _locked(file: int) -> bool:
    """Whether somebody uses the image for writing."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _USES_WRITE, 1, 0)
    try:
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked)
    except OSError:
        return False
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _deny_writing(file: int) -> bool:
    """Take the lock that keeps others from writing; False when the file system has no such locks."""
    wanted = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _DENIES_WRITE, 1, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, wanted)
    except OSError:
        return False
    return True

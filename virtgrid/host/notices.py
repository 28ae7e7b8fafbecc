"""What libvirt's hooks post to virtgridd: datagrams that never make a hook wait.

Form: one JSON object, ``{"v": 1, "driver", "domain", "operation", "sub_operation"}``. A notice says that
it is worth looking, and nothing more: it may be missing, and what is true is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virtgrid.core.errors import RefusedError

_LIMIT_BYTES: Final = 4096
_WORD_LIMIT: Final = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A step of a domain's life. driver: lxc or qemu; operation: prepare, release, reconnect, …"""

    driver: str
    domain: str
    operation: str
    sub_operation: str


def read(data: bytes) -> Notice | None:
    """A datagram as a notice; None when it is none. Pure."""
    try:
        said = json.loads(data)
        words = {key: said[key] for key in ("driver", "domain", "operation", "sub_operation")}
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    if not all(isinstance(word, str) and len(word) <= _WORD_LIMIT for word in words.values()):
        return None
    return Notice(**words)


class NoticeSocket:
    """Listens for notices from now on; only root can post any.

    A thread of its own takes them: the kernel keeps ten (net.unix.max_dgram_qlen), and a hook does not wait
    for a loop that writes to a disk. ``heard`` is called in the loop.
    """

    def __init__(self, path: Path, heard: Callable[[Notice], None]) -> None:
        self._path, self._heard = path, heard
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # whoever bound it before is gone: virtgridd's own socket says so
            before = os.umask(0o177)
            try:
                self._socket.bind(os.fspath(path))
            finally:
                os.umask(before)
        except OSError as error:
            self._socket.close()
            raise RefusedError(f"cannot listen for notices at {path}", cause=error.strerror) from error
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._take, name="notices", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        while True:
            try:
                data = self._socket.recv(_LIMIT_BYTES)
            except OSError:
                return
            if self._closed:
                return
            notice = read(data)
            if notice is None:
                _log.warning("a notice nobody understands was left out")
            else:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._tell, notice)

    def _tell(self, notice: Notice) -> None:
        if not self._closed:
            self._heard(notice)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes who reads
        self._thread.join(5)
        self._socket.close()
        self._path.unlink(missing_ok=True)

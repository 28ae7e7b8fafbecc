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
    """Listens for notices from now on; only root can post any."""

    def __init__(self, path: Path, heard: Callable[[Notice], None]) -> None:
        self._path, self._heard = path, heard
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
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
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._ready)

    def _ready(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                notice = read(self._socket.recv(_LIMIT_BYTES))
                if notice is None:
                    _log.warning("a notice nobody understands was left out")
                else:
                    self._heard(notice)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._path.unlink(missing_ok=True)

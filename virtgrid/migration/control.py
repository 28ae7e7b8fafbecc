"""Talking to a running migration: a unix socket beside its lock, one JSON line in, one out.

Only root (or the driver's own user) reaches it: the directory is 0700 and the socket 0600.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

from virtgrid.core import journal as journals
from virtgrid.core.errors import NotFoundError, PeerUnreachableError, UsageError
from virtgrid.migration import running

COMMANDS: Final = ("release", "abort", "status")
_LINE_LIMIT_BYTES: Final = 4096
_BY_LIMIT: Final = 200
_DEADLINE_S: Final = 5.0
_SOCKET_PATH_BYTES: Final = 108

Handler = Callable[[str, str], Awaitable[dict[str, Any]]]


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """A name for the socket that fits a socket address (108 bytes, unix(7)) however deep it lies."""
    if len(os.fsencode(path)) < _SOCKET_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class ControlServer:
    """Serves one migration's socket; ``handler(command, by)`` answers. An async context manager."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> ControlServer:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The lock is ours, so whatever socket is there was left by a driver that died.
        self._path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            with _address(self._path) as address:
                self._server = await asyncio.start_unix_server(
                    self._serve, path=address, limit=_LINE_LIMIT_BYTES
                )
        finally:
            os.umask(before)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_DEADLINE_S):
                answer = await self._answer(await reader.readline())
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass  # whoever asked is gone or talks nonsense; the migration goes on
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command, by = str(request["command"]), str(request.get("by", ""))[:_BY_LIMIT]
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"ok": False, "text": "not a command"}
        if command not in COMMANDS:
            return {"ok": False, "text": f"unknown command '{command[:40]}'"}
        return await self._handler(command, by)


def ask(path: Path, command: str, *, by: str) -> dict[str, Any]:
    """Send one command to a running migration -> its answer.

    Errors: NotFoundError when no migration listens there; PeerUnreachableError when it is silent.
    """
    if command not in COMMANDS:
        raise UsageError(f"'{command}' is none of {', '.join(COMMANDS)}")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(_DEADLINE_S)
        try:
            with _address(path) as address:
                peer.connect(address)
            # Cut here as it is there: a longer line would not be read at all.
            peer.sendall(json.dumps({"command": command, "by": by[:_BY_LIMIT]}).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n") and len(answer) < _LINE_LIMIT_BYTES * 16:
                chunk = peer.recv(65536)
                if not chunk:
                    break
                answer += chunk
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotFoundError(
                "this migration is not running any more", hint="virtgrid migration show tells how it ended"
            ) from error
        except OSError as error:
            raise PeerUnreachableError("the migration's driver does not answer", cause=str(error)) from error
    with contextlib.suppress(ValueError):
        parsed = json.loads(answer)
        if isinstance(parsed, dict):
            return parsed
    raise PeerUnreachableError("the migration's driver gave no answer")


def steer(journal: Path, command: str, *, by: str) -> dict[str, Any]:
    """Send a command to the driver of the migration with this journal -> its answer.

    Errors: as ``ask``; RefusedError when the file is no journal.
    """
    began = journals.read(journal)
    if not began:
        raise NotFoundError("this migration has not begun yet")
    return ask(running.socket_path(str(began[0].get("uuid"))), command, by=by)

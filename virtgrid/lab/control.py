"""Orders to the lab's own processes: one JSON object each way over a unix socket, root only.

SOCK_SEQPACKET: one packet is one message, so there is nothing to reassemble.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import LabError
from virtgrid.core.process import peer_credentials

_LIMIT_BYTES: Final = 65536
Handler = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class ControlServer:
    """The answering side, for an event loop: never blocks.

    Call ``ready(descriptor)`` for each of ``descriptors()`` that became readable.
    """

    def __init__(self, where: Path, handler: Handler) -> None:
        self._handler = handler
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        where.unlink(missing_ok=True)
        before = os.umask(0o077)
        try:
            self._listener.bind(os.fspath(where))
        finally:
            os.umask(before)
        self._listener.listen(16)
        self._callers: dict[int, socket.socket] = {}

    def descriptors(self) -> list[int]:
        return [self._listener.fileno(), *self._callers]

    def ready(self, descriptor: int) -> None:
        """Accept a caller, or answer one."""
        if descriptor == self._listener.fileno():
            with contextlib.suppress(OSError):  # the caller has gone again
                caller, _ = self._listener.accept()
                caller.setblocking(False)
                self._callers[caller.fileno()] = caller
            return
        caller = self._callers.pop(descriptor)
        with caller, contextlib.suppress(OSError):
            packet = caller.recv(_LIMIT_BYTES)
            if packet:
                caller.send(json.dumps(self._answer(packet)).encode())

    def _answer(self, packet: bytes) -> Mapping[str, Any]:
        try:
            order = json.loads(packet)
            if not isinstance(order, dict):
                return {"error": "not an object"}
            return self._handler(order)
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"not an order: {error}"}
        except (OSError, LabError) as error:
            return {"error": str(error)}


def ask(where: Path, order: Mapping[str, Any], *, timeout_s: float = 5.0) -> dict[str, Any]:
    """Send one order and return the answer. Errors: LabError, also when nobody answers in time."""
    try:
        with _connect(where, timeout_s) as connection:
            connection.send(json.dumps(order).encode())
            packet = connection.recv(_LIMIT_BYTES)
    except OSError as error:
        raise LabError(f"the lab's process at {where} does not answer", cause=str(error)) from error
    answer = json.loads(packet) if packet else {"error": "it hung up"}
    if "error" in answer:
        raise LabError(
            f"the lab's process at {where} could not {order.get('do')}", cause=str(answer["error"])
        )
    return dict(answer)


def listener_pid(where: Path) -> int | None:
    """The process that listens on the socket, as the kernel tells it; None when nobody does."""
    try:
        with _connect(where, 2.0) as connection:
            return peer_credentials(connection).pid
    except OSError:
        return None


def _connect(where: Path, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout_s)
        connection.connect(os.fspath(where))
    except BaseException:
        connection.close()
        raise
    return connection

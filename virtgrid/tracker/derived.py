"""Connections that another one announces: FTP's data connections.

A control connection says on which port the next data connection will arrive; where it comes from
and goes to are the control connection's own two addresses. Addresses in the messages are not
believed: with them a client could claim anybody's connection for its own (the bounce attack,
RFC 2577, 3), and behind NAT they are wrong.
"""

from __future__ import annotations

from typing import Final

from virtgrid.tracker.connection import Connection
from virtgrid.tracker.streams import CLOSE, UNKNOWN

_PER_CONNECTION_MAX: Final = 4
_MAX: Final = 1 << 16
#: An announced connection comes at once or not at all.
_EXPECTED_FOR_S: Final = 300.0


class Expected:
    """What is expected: addresses and port -> the control connection. Bounded for each and in all."""

    def __init__(self) -> None:
        self._owners: dict[bytes, tuple[Connection, float]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, conn: Connection, active: bool, numbers: list[int], now_s: float) -> None:
        """Expect one more; active: the server connects. numbers: the port, or its two bytes."""
        port = numbers[0] if len(numbers) == 1 else numbers[0] << 8 | numbers[1]
        if not 0 < port < 65536 or max(numbers[:-1], default=0) > 255 or conn.owner is not None:
            return
        opener = conn.server if active else conn.client
        key = opener.key[:-4] + port.to_bytes(2, "big")
        self._owners.pop(key, None)
        while len(self._owners) >= _MAX:
            del self._owners[next(iter(self._owners))]
        self._owners[key] = (conn, now_s)
        if key in conn.expects:
            conn.expects.remove(key)
        conn.expects.append(key)
        if len(conn.expects) > _PER_CONNECTION_MAX:
            self._drop(conn, conn.expects.pop(0))

    def _drop(self, conn: Connection, key: bytes) -> None:
        if (found := self._owners.get(key)) and found[0] is conn:
            del self._owners[key]

    def claim(self, conn: Connection, now_s: float) -> None:
        """Make ``conn``, just opened, its control connection's data connection if it is expected."""
        if not self._owners:
            return
        key = conn.client.key[:-4] + conn.client.key[-2:]
        found = self._owners.pop(key, None)
        if found is None:
            return
        owner, since_s = found
        if key in owner.expects:
            owner.expects.remove(key)
        if owner.closed or owner is conn or now_s - since_s > _EXPECTED_FOR_S:
            return
        if owner.data is not None:
            owner.data.owner = None
        owner.data = conn
        conn.owner = owner
        conn.by_guest = owner.by_guest
        conn.large_bytes = owner.large_bytes
        conn.label = f"{owner.label}-data"
        conn.client.mode = conn.server.mode = CLOSE
        if owner.queue and owner.queue[0].transfer:
            announce(conn, owner.queue[0].size)

    def awaits(self, key: bytes) -> bool:
        """Whether a segment with this key could be a derived connection's first, sent by its opener."""
        return key[:-4] + key[-2:] in self._owners

    def forget(self, conn: Connection) -> None:
        """The connection announces nothing any more."""
        for key in conn.expects:
            self._drop(conn, key)
        conn.expects.clear()


def announce(data: Connection, size: int) -> None:
    """A transfer of so many bytes (0: not known) begins on a data connection, or one has ended."""
    for stream in (data.client, data.server):
        stream.total = size or UNKNOWN
        stream.seen = 0
        stream.large = False

"""A program's output on a connection of its own: frames of a kind, a length and bytes. Pure.

After ``exec`` was answered the connection carries frames towards the pilot: one byte that says what
(``o`` standard output, ``e`` standard error, ``x`` the end), four bytes of length (network order), and so
many bytes. The end is a JSON object with the members of ``End``. A connection that ends before it was a
program whose end is not known. Only the standard library: the process that writes frames is small on
purpose.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Final

HEADER: Final = struct.Struct("!cI")
PIECE_BYTES: Final = 32 << 10
"""The largest frame of output."""
END_LIMIT_BYTES: Final = 4 << 10
STDOUT, STDERR, END = b"o", b"e", b"x"


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How the program ended: its exit status as a shell tells it, and what it used, entering included."""

    status: int | None
    problem: str | None = None
    user_s: float = 0.0
    system_s: float = 0.0
    max_rss_bytes: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Frame:
    kind: bytes
    data: bytes


def pack(kind: bytes, data: bytes) -> bytes:
    """One frame."""
    return HEADER.pack(kind, len(data)) + data


def pack_end(end: End) -> bytes:
    return pack(END, json.dumps(asdict(end)).encode())


def unpack_header(header: bytes) -> tuple[bytes, int]:
    """Kind and length. Errors: ValueError for what no runner sends."""
    kind, length = HEADER.unpack(header)
    limit = {STDOUT: PIECE_BYTES, STDERR: PIECE_BYTES, END: END_LIMIT_BYTES}.get(kind)
    if limit is None or length > limit:
        raise ValueError(f"no frame begins with {header!r}")
    return kind, length


def unpack_end(data: bytes) -> End:
    """Errors: ValueError."""
    try:
        return End(**json.loads(data))
    except TypeError as error:
        raise ValueError(str(error)) from None

"""Bytes the capture need not hand over: the inside of a long body is arithmetic (streams.py).

A ``Skip`` names a range of one direction's sequence numbers. Whoever captures may leave out
segments that end inside it, and tells now and then how far they have come (``Tracker.skipped``), so
that counts, progress and silences stay right. Leaving out nothing, or only some of it, is just as
good. Three places in a body are seen all the same:

    its first byte    an upload counts as under way from there on
    the byte that makes a body of unknown length a large transfer: the verdict changes with it
    its last byte     nobody else may say that a message is complete
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from virtgrid.tracker.streams import CHUNK, CLOSE, COUNTED, HOLE_MAX, MASK, Stream

#: Shorter rests are over before the capture could be told, or cost less than telling it.
SKIP_BYTES_MIN: Final = 128 << 10
#: Well inside what the stream takes for a hole; longer bodies are skipped piece by piece.
SKIP_BYTES_MAX: Final = HOLE_MAX >> 1
#: So many directions at once: asking how far each has come must stay cheap.
SKIPS_MAX: Final = 4096
#: Streams that could be skipped; the oldest fall out, for skipping is a favour, not a duty.
_BEGUN_MAX: Final = 8192
_LOOKS_MAX: Final = 64
_BODIES: Final = frozenset({COUNTED, CHUNK, CLOSE})


class Skip(NamedTuple):
    """Bytes [begin, end) of a direction need not be seen; an empty range: all must be, from now on.

    key: the direction's addresses and ports, as in decode.Segment.
    """

    key: bytes
    begin: int
    end: int


class Skips:
    """Which streams are skipped, and which could be."""

    def __init__(self) -> None:
        self._begun: deque[Stream] = deque(maxlen=_BEGUN_MAX)
        self._active: dict[bytes, tuple[Stream, int]] = {}
        self._ended: list[Skip] = []

    def body(self, stream: Stream) -> None:
        """A body, or a chunk of one, has begun."""
        if stream.mode == CLOSE or stream.need > SKIP_BYTES_MIN:
            self._begun.append(stream)

    def told(self) -> list[Skip]:
        """What to do since the last call; cheap however many bodies are under way."""
        out, self._ended = self._ended, []
        for _ in range(min(len(self._begun), _LOOKS_MAX)):
            stream = self._begun.popleft()
            rest = SKIP_BYTES_MAX if stream.mode == CLOSE else min(stream.need - 1, SKIP_BYTES_MAX)
            if not in_body(stream) or rest < SKIP_BYTES_MIN or len(self._active) >= SKIPS_MAX:
                continue
            if not stream.large:
                rest = min(rest, stream.conn.large_bytes - 1 - stream.seen)
            # Nothing of a body seen: not even where it begins may be known.
            if not stream.seen or stream.waiting or rest < SKIP_BYTES_MIN:
                self._begun.append(stream)  # later, perhaps
                continue
            end = (stream.nxt + rest) & MASK
            self._active[stream.key] = (stream, end)
            out.append(Skip(stream.key, stream.nxt, end))
        return out

    def look(self, stream: Stream) -> None:
        """A stream that may be skipped has moved: is there anything left of its range?"""
        known, end = self._active.get(stream.key, (None, 0))
        if known is not stream or (in_body(stream) and 0 < (end - stream.nxt) & MASK <= SKIP_BYTES_MAX):
            return
        self.end(stream)
        if in_body(stream):
            self._begun.append(stream)

    def end(self, stream: Stream) -> None:
        """All of the stream's bytes are wanted again, or it has gone."""
        known, _ = self._active.get(stream.key, (None, 0))
        if known is stream:
            del self._active[stream.key]
            self._ended.append(Skip(stream.key, 0, 0))


def in_body(stream: Stream) -> bool:
    """Whether what comes next is the inside of a body, of which only the length counts."""
    return stream.mode in _BODIES and not stream.conn.opaque and not stream.conn.closed

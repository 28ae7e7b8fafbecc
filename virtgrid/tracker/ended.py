"""Connections that have ended, remembered for a while: what still comes of them opens no new one.

A pause makes clients send again, and a copy can arrive after its connection's end; what was under
way to a client that reset its connection arrives too. Taken for connections seen mid-stream they
would be unknown, and hold a migration that nobody needs to wait for.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from virtgrid.tracker.decode import Segment
from virtgrid.tracker.streams import HALF, MASK, UNKNOWN, Stream

_MAX: Final = 1 << 16
#: A copy comes within the retransmission time-outs of the end.
_COPIES_S: Final = 60.0
#: What was under way when the reset passed. Short: not every reset is believed by its receiver.
_UNDER_WAY_S: Final = 1.0


class Ended:
    """Directions that are over: key -> (where its bytes end, or UNKNOWN after a reset; when). Bounded."""

    def __init__(self) -> None:
        # Ordered, because the first of a dict lies behind all that has been deleted before it.
        self._ends: OrderedDict[bytes, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ends)

    def closed(self, stream: Stream, at_s: float) -> None:
        """Both directions have been closed in order, this one at its FIN."""
        if stream.fin != UNKNOWN:
            self._add(stream.key, stream.fin, at_s)

    def reset(self, stream: Stream, at_s: float) -> None:
        """The other side has reset: it takes nothing of this direction any more."""
        self._add(stream.key, UNKNOWN, at_s)

    def _add(self, key: bytes, end: int, at_s: float) -> None:
        self._ends.pop(key, None)
        if len(self._ends) >= _MAX:
            self._ends.popitem(last=False)
        self._ends[key] = end, at_s

    def late(self, segment: Segment, at_s: float) -> bool:
        """Whether the segment belongs to what is over: nothing but a copy, or under way when it was reset."""
        found = self._ends.get(segment.key)
        if found is None:
            return False
        end, ended_s = found
        if end == UNKNOWN:
            return at_s < ended_s + _UNDER_WAY_S
        left = (end - (segment.seq + segment.length)) & MASK
        return left < HALF and at_s < ended_s + _COPIES_S

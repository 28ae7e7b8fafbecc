"""A block's segments by connection, and what follows in it without a break.

Sorted by connection, and within one in the order of the frames, segments are named by their *position*.
A *stretch* is a part of one direction's bytes: segments with payload, each following on the one before,
with nothing between them but acknowledgements. On an ordinary connection a request is one stretch and
its answer the next, however many segments they have. Whatever is not ordinary is a stretch for
itself, and *odd*: SYN, FIN, RST or no ACK, and a header that was decoded alone. All of it is found by
comparing columns with themselves, moved by one.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from virtgrid.core.frames import Flags, Integers
from virtgrid.tracker.columns import Columns
from virtgrid.tracker.decode import ACK, FIN, RST, SYN
from virtgrid.tracker.pairs import pairs_of
from virtgrid.tracker.streams import MASK, UNKNOWN


class Group:
    """One connection's segments: between ``at``, the first not dealt with, and ``stop``.

    keys: of its two directions. stretch: the next of them that may be of use, before ``stretch_stop``. event:
    the position of the segment that is waited for; UNKNOWN: none. fin: where the event is the second
    side's end, the first's.
    """

    __slots__ = ("at", "event", "fin", "keys", "stop", "stretch", "stretch_stop")

    def __init__(
        self, keys: tuple[bytes, bytes], places: tuple[int, int], stretches: tuple[int, int]
    ) -> None:
        self.keys = keys
        self.at, self.stop = places
        self.stretch, self.stretch_stop = stretches
        self.event = self.fin = UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretches:
    """The stretches of a block, those of a connection one after the other.

    first, last: positions. second: the direction. odd. seq. number: of the last segment's frame. apart:
    the next stretch that is odd or does not follow on. length: of all its payload. start, end: where what
    was captured of the first segment lies in the buffer, or enough of that.
    """

    first: array[int]
    last: array[int]
    second: array[int]
    odd: array[int]
    seq: array[int]
    number: array[int]
    apart: array[int]
    length: list[int]
    start: list[int]
    end: list[int]


class Flows:
    """The segments of a block by connection.

    By position: index (the frame's), seq, ack, flags, length, start, end, second (the direction); work: the
    next position with more than an acknowledgement; breaks: the next that is odd or does not follow on.
    sums: payload before a position, by direction; last: the last segment of a direction at or before one.
    """

    def __init__(self, columns: Columns) -> None:
        size = len(columns.index)
        pairs = pairs_of(columns.keys)
        order, ordered, second = pairs.order, pairs.ordered, pairs.second
        seq, length, flags = columns.seq[order], columns.length[order], columns.flags[order]
        index, start, end = columns.index[order], columns.start[order], columns.end[order]
        odd = (flags & _SPECIAL) != ACK
        if columns.slow:
            odd |= np.isin(index, np.fromiter(columns.slow, np.int64, len(columns.slow)))
        data = length > 0
        bytes_1 = np.where(second, length, 0)
        sums = [np.concatenate(([0], np.cumsum(of))) for of in (length - bytes_1, bytes_1)]
        holes = np.zeros(size, np.bool_)
        for direction, total in zip((~second, second), sums, strict=True):
            holes |= _holes(direction & data, seq, total, ordered)
        position = np.arange(size)
        ack = columns.ack[order]
        self.index, self.second = _array(index), _array(second)
        self.seq, self.ack, self.flags, self.length = _array(seq), _array(ack), _array(flags), _array(length)
        self.start, self.end = _array(start), _array(end)
        self.sums = (_array(sums[0]), _array(sums[1]))
        self.last = tuple(
            _array(np.maximum.accumulate(np.where(second == bool(of), position, UNKNOWN))) for of in (0, 1)
        )
        self.breaks = _array(_upcoming(odd | holes, position))
        work = odd | data
        self.work = _array(_upcoming(work, position))
        self.stretches, edges = _stretches(
            np.flatnonzero(work), ordered, second, odd, holes, (seq, length, start, end, index)
        )
        count = len(pairs.keys)
        begins = [*np.searchsorted(ordered, np.arange(count)).tolist(), size]
        firsts = [*np.searchsorted(edges, np.arange(count)).tolist(), len(edges)]
        self.groups = list(map(Group, pairs.keys, pairwise(begins), pairwise(firsts)))
        self._group_of: dict[bytes, Group] = {}

    def group(self, key: bytes) -> Group | None:
        """The segments of the connection with such a key."""
        if not self._group_of:
            self._group_of = {of: group for group in self.groups for of in group.keys}
        return self._group_of.get(key)


#: Of a message, as much is looked at for its head.
_HEAD_BYTES: Final = 512
_SPECIAL: Final = SYN | FIN | RST | ACK


def _array(column: NDArray[Any]) -> array[int]:
    """For looking up single numbers, which Python's own arrays do in a third of the time."""
    return array("b" if column.dtype == np.bool_ else "q", column.tobytes())


def _upcoming(where: Flags, position: Integers) -> Integers:
    """Of each position, the next at which something is so; the end, where there is none."""
    return np.minimum.accumulate(np.where(where, position, len(position))[::-1])[::-1]


def _holes(data: Flags, seq: Integers, total: Integers, pair: NDArray[Any]) -> Flags:
    """Where a direction's data does not follow the data before it of the same connection.

    Along data without holes, sequence number minus the bytes of the block before it is a constant.
    """
    out = np.zeros(len(seq), np.bool_)
    where = np.flatnonzero(data)
    base = (seq[where] - total[where]) & MASK
    out[where[1:]] = (base[1:] != base[:-1]) & (pair[where[1:]] == pair[where[:-1]])
    return out


def _stretches(
    work: Integers,
    pair: NDArray[Any],
    second: Flags,
    odd: Flags,
    holes: Flags,
    columns: tuple[Integers, ...],
) -> tuple[Stretches, NDArray[Any]]:
    """The stretches among the positions ``work``, and of each its connection's number."""
    seq, length, start, end, index = columns
    pair, second, odd, holes = pair[work], second[work], odd[work], holes[work]
    apart = odd | holes
    begins = apart.copy()
    begins[:1] = True
    begins[1:] |= (pair[1:] != pair[:-1]) | (second[1:] != second[:-1]) | odd[:-1]
    places = np.flatnonzero(begins)
    first = work[places]
    last = work[np.append(places[1:], len(work))[: len(places)] - 1]
    found = Stretches(
        first=_array(first),
        last=_array(last),
        second=_array(second[places]),
        odd=_array(odd[places]),
        seq=_array(seq[first]),
        number=_array(index[last]),
        apart=_array(_upcoming(apart[places], np.arange(len(places)))),
        # Looked up of nearly every stretch: a list gives it in half the time, and takes longer to make.
        length=(np.add.reduceat(length[work], places) if len(work) else work).tolist(),
        start=start[first].tolist(),
        end=np.minimum(end[first], start[first] + _HEAD_BYTES).tolist(),
    )
    return found, pair[places]

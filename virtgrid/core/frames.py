"""Captured frames by the thousand, without an object for each: where they lie in a buffer, as columns.

A ring of the kernel and a capture file both are a buffer with frames in it. Their readers fill in
the columns, and the tracker (``Tracker.feed_block``) works on all frames at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
#: What lies behind the captured bytes of a frame; asked for at most once. Empty: it is not to be had.
Rest = Callable[[], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameBlock:
    """Ethernet frames in one buffer of bytes, in the order they came; columns of equal length.

    offsets: where each frame begins; captured: bytes of it in the buffer; wire_lens: its length on
    the wire (at least ``captured``). times_s: seconds on the clock of the file or the caller.
    whole: all of a frame of which only the beginning was captured, by its index; empty where it is not
    to be had. It is asked in the order of the frames, once for each, and what it gives is valid until it
    is asked again. The buffer may be used again for other frames once the block has been fed.
    """

    buffer: memoryview
    offsets: Integers
    captured: Integers
    wire_lens: Integers
    times_s: Floats
    whole: Callable[[int], memoryview] | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def frame(self, index: int) -> bytes:
        """A copy of one frame's captured bytes."""
        at = int(self.offsets[index])
        return bytes(self.buffer[at : at + int(self.captured[index])])

    def rest(self, index: int) -> Rest | None:
        """How to get what lies behind the captured bytes of a frame; None where nobody knows."""
        return None if self.whole is None else partial(self._rest, self.whole, index)

    def _rest(self, whole: Callable[[int], memoryview], index: int) -> bytes:
        return bytes(whole(index)[int(self.captured[index]) :])

    def each(self) -> Iterator[tuple[bytes, int, float, Rest | None]]:
        """The frames one by one: captured bytes, length on the wire, time, the rest of it."""
        columns = (self.offsets, self.captured, self.wire_lens, self.times_s)
        for index, (at, size, wire_len, at_s) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            rest = self.rest(index) if size < wire_len else None
            yield bytes(self.buffer[at : at + size]), wire_len, at_s, rest


def block_of(frames: Iterable[tuple[float, int, bytes]]) -> FrameBlock:
    """A block of single frames: (seconds, length on the wire, bytes) each."""
    rows = list(frames)
    captured = np.array([len(data) for _, _, data in rows], np.int64)
    return FrameBlock(
        buffer=memoryview(b"".join(data for _, _, data in rows)),
        offsets=np.cumsum(captured) - captured,
        captured=captured,
        wire_lens=np.array([wire_len for _, wire_len, _ in rows], np.int64),
        times_s=np.array([at_s for at_s, _, _ in rows], np.float64),
    )

"""How many connections are unsuitable: now, and at any moment of the last while."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

_MAX: Final = 1 << 17
#: How often, in changes, what is too old is looked for.
_TRIM_EVERY: Final = 64


class Counts:
    """Changes of the count in the order of their times. history_s: so far back they are kept."""

    def __init__(self, history_s: float) -> None:
        self.now = 0
        self.times: list[float] = []
        self.counts: list[int] = []
        self._history_s = history_s
        self._trimmed = False

    def step(self, by: int, at_s: float) -> None:
        """So many more from ``at_s`` on."""
        self.now += by
        times, counts = self.times, self.counts
        if times and times[-1] >= at_s:
            counts[-1] = self.now
            return
        times.append(at_s)
        counts.append(self.now)
        if len(times) % _TRIM_EVERY:
            return
        if len(times) >= _MAX or times[len(times) // 2] < at_s - self._history_s:
            # Rarely, and half at once; one entry at or before the horizon is always kept.
            keep = max(bisect_right(times, at_s - self._history_s) - 1, len(times) - _MAX // 2, 0)
            del times[:keep], counts[:keep]
            self._trimmed = self._trimmed or keep > 0

    def at(self, at_s: float) -> int | None:
        """How many there were at a moment; None when that is too long ago."""
        index = bisect_right(self.times, at_s)
        if index:
            return self.counts[index - 1]
        return None if self.times and self._trimmed else 0

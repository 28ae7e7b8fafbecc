"""When something could be had: arithmetic of free times. Pure.

What can be had from t on for so long is said by its *beginnings*: spans of t, both ends included. Those of
several parties can be intersected, so the nearest window that fits all is found without asking each about
every moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from virtgrid.grid.messages.coalloc import Span, Window

Times = tuple[int, int]
"""From (included) until (not included), seconds since the epoch."""
SPANS_LIMIT: Final = 256
OFFERED: Final = 3
"""Windows told in a refusal."""


def gaps(busy: Iterable[Times], within: Times) -> list[Times]:
    """The times within a horizon that no busy time covers. busy: in order of its beginnings."""
    free, at = [], within[0]
    for begins_s, ends_s in busy:
        if begins_s > at:
            free.append((at, min(begins_s, within[1])))
        at = max(at, ends_s)
        if at >= within[1]:
            break
    if at < within[1]:
        free.append((at, within[1]))
    return free


def without(free: Iterable[Times], busy: Iterable[Times]) -> list[Times]:
    """Free times less busy ones, in whatever order those are."""
    taken = sorted(busy)
    return [piece for one in free for piece in gaps(taken, one)]


def beginnings(free: Iterable[Sequence[Times]], *, need: int, lasts_s: int) -> list[Span]:
    """When at least ``need`` units are free for ``lasts_s`` on end. free: of each unit its gaps."""
    changes: dict[int, int] = {}
    for unit in free:
        for from_s, until_s in unit:
            if until_s - from_s >= lasts_s:
                changes[from_s] = changes.get(from_s, 0) + 1
                after_s = until_s - lasts_s + 1
                changes[after_s] = changes.get(after_s, 0) - 1
    found: list[Span] = []
    count, since_s = 0, None
    for at_s in sorted(changes):
        count += changes[at_s]
        if count >= need and since_s is None:
            since_s = at_s
        elif count < need and since_s is not None:
            found.append(Span(first_s=since_s, last_s=at_s - 1))
            since_s = None
    return found


def common(these: Sequence[Span], those: Sequence[Span]) -> list[Span]:
    """Beginnings that are in both."""
    found, i, j = [], 0, 0
    while i < len(these) and j < len(those):
        first_s = max(these[i].first_s, those[j].first_s)
        last_s = min(these[i].last_s, those[j].last_s)
        if first_s <= last_s:
            found.append(Span(first_s=first_s, last_s=last_s))
        if these[i].last_s < those[j].last_s:
            i += 1
        else:
            j += 1
    return found


def around(spans: Sequence[Span], near_s: int) -> tuple[Span, ...]:
    """The spans nearest to a time, in order, as many as a message may have."""
    closest = sorted(spans, key=lambda span: abs(_closest(span, near_s) - near_s))[:SPANS_LIMIT]
    return tuple(sorted(closest, key=lambda span: span.first_s))


def nearest(spans: Iterable[Span], near_s: int, lasts_s: int) -> tuple[Window, ...]:
    """The windows nearest to a wanted beginning, one of each span, the nearest first."""
    begins = sorted({_closest(span, near_s) for span in spans}, key=lambda at_s: (abs(at_s - near_s), at_s))
    return tuple(Window(begins_at_s=at_s, ends_at_s=at_s + lasts_s) for at_s in begins[:OFFERED])


def _closest(span: Span, near_s: int) -> int:
    return min(max(near_s, span.first_s), span.last_s)

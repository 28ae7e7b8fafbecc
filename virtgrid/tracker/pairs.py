"""Segments by connection: both directions of one get its number, and are put together.

A key is looked up in a dictionary, one segment after the other; or, of nothing but usual IPv4, all keys
are hashed as columns and sorted once, which takes a tenth of that. Two connections with the same hash are
noticed, and the dictionary does it then: whoever provokes that gains nothing.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virtgrid.core.frames import Flags, Integers
from virtgrid.tracker.columns import Rows, listed

#: Two addresses and two ports, as in Segment.
_FOUR_BYTES: Final = 12
#: Odd numbers without a pattern; products keep their best bits on top.
_MIX_LOW: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_HIGH: Final = np.uint64(0xC2B2AE3D27D4EB4F)


class Pairs(NamedTuple):
    """Segments sorted by connection, and within one as they came.

    order: where each came from. ordered: its connection's number, from 0 on without a gap. second: whether
    it goes against the connection's first segment. keys: by number, of both directions.
    """

    order: Integers
    ordered: NDArray[Any]
    second: Flags
    keys: list[tuple[bytes, bytes]]


def pairs_of(keys: list[bytes] | Rows) -> Pairs:
    """Segments with these keys by connection; connections in no particular order."""
    if isinstance(keys, np.ndarray) and keys.itemsize == _FOUR_BYTES:
        found = _by_hash(keys)
        if found is not None:
            return found
    return _by_number(listed(keys))


def _reverse(key: bytes) -> bytes:
    """The key of the other direction."""
    half = (len(key) - 4) // 2
    return key[half:-4] + key[:half] + key[-2:] + key[-4:-2]


class _Numbers(dict[bytes, int]):
    """Keys to numbers: a connection's two directions are 2n and 2n + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[bytes, bytes]] = []

    def __missing__(self, key: bytes) -> int:
        reverse = _reverse(key)
        number = 2 * len(self.pairs)
        self.pairs.append((key, reverse))
        self[reverse] = number + 1
        self[key] = number
        return number


def _by_number(keys: list[bytes]) -> Pairs:
    numbers = _Numbers()
    which = np.fromiter(map(numbers.__getitem__, keys), np.int64, len(keys))
    # Radix sort for two-byte numbers.
    pair = (which >> 1).astype(np.uint16 if len(keys) <= 0x10000 else np.int64)
    order = np.argsort(pair, kind="stable")
    return Pairs(order, pair[order], (which[order] & 1).astype(np.bool_), numbers.pairs)


def _by_hash(keys: Rows) -> Pairs | None:
    """None when two connections have the same hash."""
    count = len(keys)
    if not count:
        return None
    flat = np.ascontiguousarray(keys)
    addresses = flat.view(np.uint32).reshape(count, 3)
    ports = flat.view(np.uint16).reshape(count, 6)
    one = addresses[:, 0].astype(np.uint64) << np.uint64(16) | ports[:, 4]
    other = addresses[:, 1].astype(np.uint64) << np.uint64(16) | ports[:, 5]
    low, high = np.minimum(one, other), np.maximum(one, other)
    # Above, the hash of both ends; below it the place, so that equal ones stay in their order.
    places = (1 << count.bit_length()) - 1
    mixed = low * _MIX_LOW + (high ^ high >> np.uint64(29)) * _MIX_HIGH
    mixed = np.sort(mixed & np.uint64(~places & (1 << 64) - 1) | np.arange(count, dtype=np.uint64))
    order = (mixed & np.uint64(places)).astype(np.int64)
    low, high = low[order], high[order]
    changes = np.ones(count, np.bool_)
    changes[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    begins = np.flatnonzero(changes)
    tags = mixed[begins] & np.uint64(~places & (1 << 64) - 1)
    if (tags[1:] == tags[:-1]).any():
        return None
    ordered = np.cumsum(changes) - 1
    up = (one > other)[order]
    first = flat[order[begins]].tolist()
    return Pairs(order, ordered, up ^ up[begins][ordered], [(key, _reverse(key)) for key in first])

"""The TCP segments of a block of frames, as columns: the headers of all frames decoded together.

The common case is decoded by NumPy: Ethernet, IPv4 without options or IPv6 without extension
headers, TCP. Everything else goes through ``decode``, which stays the reference: a frame is a
segment here when it is one there, with equal fields (a property test holds them together).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from virtgrid.core.frames import Flags, FrameBlock, Integers
from virtgrid.tracker.decode import Segment, decode

_FOUR: Final = 54
_SIX: Final = 74
_COMMON: Final = {
    "to_high": (">u2", 0), "to_low": (">u4", 2), "from_high": (">u2", 6), "from_low": (">u4", 8),
    "kind": (">u2", 12), "first": ("u1", 14),
}  # fmt: skip
_FOUR_FIELDS: Final = _COMMON | {
    "total": (">u2", 16), "fragment": (">u2", 20), "proto": ("u1", 23), "key": ("V12", 26),
    "seq": (">u4", 38), "ack": (">u4", 42), "word": (">u2", 46),
    "six_proto": ("u1", 20),
}  # fmt: skip
_SIX_FIELDS: Final = _COMMON | {
    "total": (">u2", 18), "proto": ("u1", 20), "key": ("V36", 22),
    "seq": (">u4", 58), "ack": (">u4", 62), "word": (">u2", 66),
}  # fmt: skip

Rows = NDArray[np.void]


def _layout(fields: dict[str, tuple[str, int]], size: int) -> np.dtype[Any]:
    return np.dtype(
        {
            "names": list(fields),
            "formats": [kind for kind, _ in fields.values()],
            "offsets": [at for _, at in fields.values()],
            "itemsize": size,
        }
    )


_FOUR_LAYOUT: Final = _layout(_FOUR_FIELDS, _FOUR)
_SIX_LAYOUT: Final = _layout(_SIX_FIELDS, _SIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Segments in the order of their frames.

    index: of the frame in the block. keys, seq, ack, flags, length: as in Segment; the keys of nothing but
    usual IPv4 are a column of records. start, end: where
    what was captured of the payload lies in the buffer. slow: the segments, by frame index, that
    were decoded one by one; their payload is in there.
    """

    index: Integers
    keys: list[bytes] | Rows
    seq: Integers
    ack: Integers
    flags: Integers
    length: Integers
    start: Integers
    end: Integers
    slow: dict[int, Segment]


def columns_of(block: FrameBlock, macs: Collection[bytes] | None = None) -> Columns:
    """The segments of a block. macs: leave out the frames that are neither to nor from one of these."""
    captured = block.captured
    usual = np.flatnonzero(captured >= _FOUR)
    rows = _rows(block, usual, _FOUR_LAYOUT)
    if macs is not None:
        mine = _concerns(rows, macs)
        usual, rows = usual[mine], rows[mine]
    kind, first, proto = rows["kind"], rows["first"], rows["proto"]
    is_four, is_six = kind == 0x0800, kind == 0x86DD
    four = is_four & (first == 0x45) & (proto == 6) & (rows["fragment"] & 0x3FFF == 0)
    six = is_six & (first >> 4 == 6) & (rows["six_proto"] == 6) & (captured[usual] >= _SIX)
    # No TCP, for certain: the rest is looked at one by one.
    nothing = (is_four & (proto != 6)) | (is_six & (rows["six_proto"] == 17))
    nothing |= (kind != 0x8100) & (kind != 0x88A8) & (kind != 0x9100) & ~is_four & ~is_six
    # Copying the rows costs more than all that has been found out about them.
    usual_four, rows_four = (usual, rows) if four.all() else (usual[four], rows[four])
    parts = [_segments(block, usual_four, rows_four, 14, 34)]
    if six.any():
        index = usual[six]
        parts.append(_segments(block, index, _rows(block, index, _SIX_LAYOUT), 54, 54))
    short = np.flatnonzero(captured < _FOUR)
    odd = np.concatenate((short, usual[~(four | six | nothing)]))
    slow = _one_by_one(block, odd, macs)
    if slow:
        parts.append(_slow_part(slow))
    if len(parts) == 1:
        return parts[0]
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("index", "seq", "ack", "flags", "length", "start", "end")
    }
    order = np.argsort(joined["index"], kind="stable")
    keys = [key for part in parts for key in listed(part.keys)]
    return Columns(
        keys=[keys[at] for at in order.tolist()],
        slow=slow,
        **{name: column[order] for name, column in joined.items()},
    )


def listed(keys: list[bytes] | Rows) -> list[bytes]:
    """Keys as bytes each."""
    if isinstance(keys, list):
        return keys
    found: list[bytes] = keys.tolist()
    return found


def _rows(block: FrameBlock, index: Integers, layout: np.dtype[Any]) -> Rows:
    """The first bytes of some frames, copied out as records; each has at least so many."""
    size = layout.itemsize
    count = block.buffer.nbytes - size + 1
    if not len(index) or count < 1:
        return np.empty(0, layout)
    # One record at every byte, overlapping: to index it copies a record per frame and no more.
    every = np.ndarray((count,), f"V{size}", block.buffer, strides=(1,))
    return np.ndarray((len(index),), layout, every[block.offsets[index]])


def _concerns(rows: Rows, macs: Collection[bytes]) -> Flags:
    """Which frames are to or from one of the addresses."""
    mine = np.zeros(len(rows), np.bool_)
    for mac in macs:
        high, low = int.from_bytes(mac[:2], "big"), int.from_bytes(mac[2:], "big")
        mine |= (rows["to_low"] == low) & (rows["to_high"] == high)
        mine |= (rows["from_low"] == low) & (rows["from_high"] == high)
    return mine


def _segments(block: FrameBlock, index: Integers, rows: Rows, total_from: int, tcp: int) -> Columns:
    """The usual frames' segments. total_from: what the header's length counts from; tcp: its place."""
    wire = block.wire_lens[index]
    total = rows["total"].astype(np.int64)
    word = rows["word"].astype(np.int64)
    start = tcp + (word >> 12) * 4
    end = np.where(total > 0, total_from + total, wire)
    length = end - start
    good = (start >= tcp + 20) & (length >= 0) & (end <= wire)
    if not good.all():
        index, rows, word, start, end, length = (
            column[good] for column in (index, rows, word, start, end, length)
        )
    offset = block.offsets[index]
    kept = np.minimum(end, block.captured[index])
    return Columns(
        index=index,
        keys=rows["key"],
        seq=rows["seq"].astype(np.int64),
        ack=rows["ack"].astype(np.int64),
        flags=word & 0x1FF,
        length=length,
        start=offset + start,
        end=offset + np.maximum(kept, start),
        slow={},
    )


def _one_by_one(block: FrameBlock, index: Integers, macs: Collection[bytes] | None) -> dict[int, Segment]:
    out = {}
    for at in np.sort(index).tolist():
        frame = block.frame(at)
        if macs is not None and frame[6:12] not in macs and frame[0:6] not in macs:
            continue
        segment = decode(frame, int(block.wire_lens[at]))
        if segment is not None:
            out[at] = segment
    return out


def _slow_part(slow: dict[int, Segment]) -> Columns:
    numbers = np.array([(s.seq, s.ack, s.flags, s.length) for s in slow.values()], np.int64).T
    none = np.zeros(len(slow), np.int64)
    return Columns(
        index=np.fromiter(slow, np.int64, len(slow)),
        keys=[s.key for s in slow.values()],
        seq=numbers[0],
        ack=numbers[1],
        flags=numbers[2],
        length=numbers[3],
        start=none,
        end=none,
        slow=slow,
    )

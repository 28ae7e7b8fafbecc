"""Capture files, pcap and pcapng, as blocks of Ethernet frames with their lengths on the wire.

Own reading instead of a library's, for two reasons: the length on the wire and frames cut short by
a snap length are what the tracker is about, and a frame costs a step along the records and no more.
The file is mapped, or read in large pieces into one buffer; of a piece, only where its records begin is found
in a loop, and their numbers are taken out together. Frames without an Ethernet header get one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from virtgrid.core.errors import RefusedError
from virtgrid.core.frames import FrameBlock, Integers, block_of
from virtgrid.core.mapped import mapped

#: No frame and no pcapng block is larger.
_RECORD_MAX: Final = 16 << 20
#: A block costs something for each connection in it, whatever it has there; larger ones fall out of caches.
_PIECE_BYTES: Final = 16 << 20
_FRAMES_MAX: Final = 1 << 15
#: Records of fewer bytes, on average, are looked for along lanes of so many bytes.
_SHORT_BYTES: Final = 1536
_LANE_BYTES: Final = 64 << 10
_LANE_STEPS_MAX: Final = 256
#: After so many steps it is asked whether they were the last.
_LANE_STEPS: Final = 4
_MAGIC: Final = {
    b"\xd4\xc3\xb2\xa1": ("<", 1e-6),
    b"\xa1\xb2\xc3\xd4": (">", 1e-6),
    b"\x4d\x3c\xb2\xa1": ("<", 1e-9),
    b"\xa1\xb2\x3c\x4d": (">", 1e-9),
}
_PCAPNG: Final = b"\x0a\x0d\x0d\x0a"
_SECTION, _INTERFACE, _SIMPLE, _PACKET = 0x0A0D0D0A, 1, 3, 6
_FOUR: Final = bytes(12) + b"\x08\x00"
_SIX: Final = bytes(12) + b"\x86\xdd"
_ETHERNET: Final = 1

Words = NDArray[np.uint32]


class Readable(Protocol):
    """A file opened for reading bytes."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class Frame(NamedTuple):
    """A captured frame: seconds (of the file's or the caller's clock), length on the wire, bytes."""

    at_s: float
    wire_len: int
    data: bytes


def read_frames(file: Readable, name: str, damaged: Callable[[str], None] | None = None) -> Iterator[Frame]:
    """The frames of a capture file, one by one; as ``read_blocks``."""
    for block in read_blocks(file, name, damaged):
        for index, (at_s, wire_len) in enumerate(
            zip(block.times_s.tolist(), block.wire_lens.tolist(), strict=True)
        ):
            yield Frame(at_s, wire_len, block.frame(index))


def read_blocks(
    file: Readable, name: str, damaged: Callable[[str], None] | None = None
) -> Iterator[FrameBlock]:
    """The frames of a capture file in the file's order; a torn last record is left out.

    A block is good until the next one is asked for. damaged: called with a sentence when nothing can
    be read behind a damaged record; without it that is an error. Errors: RefusedError when the file
    is no capture.
    """
    try:
        yield from _read(file, name)
    except _DamagedError as error:
        if damaged is None:
            raise RefusedError(f"{name} is damaged", cause=str(error)) from error
        damaged(f"{name} is damaged, only what comes before was read: {error}")


class _DamagedError(ValueError):
    """A record that cannot be one."""


class _Piece:
    """A part of the file: ``view[at:end]`` has been read and not been used.

    Where the file can be mapped nothing is copied: the part is a window that moves along it.
    short_records: how the records seen last were.
    """

    def __init__(self, file: Readable) -> None:
        self._file = file
        self.at = self.end = 0
        self.short_records = False
        self.buffer: bytearray | mmap
        self._mapped = mapped(file)
        if self._mapped is not None:
            self.buffer, self.view = self._mapped.bytes, self._mapped.view
        else:
            self._make(_PIECE_BYTES)

    def _make(self, size: int) -> None:
        self.buffer = bytearray(size)
        self.view = memoryview(self.buffer)

    def has(self, size: int) -> bool:
        """Whether so many bytes are there from ``at`` on, after reading on if need be."""
        left = self.end - self.at
        if left >= size:
            return True
        if self._mapped is not None:
            if self._mapped.held():
                self.end = min(len(self.view), self.at + max(size, _PIECE_BYTES))
                return self.end - self.at >= size
            # Somebody is about to change it: the rest is read as any other file is.
            self._mapped.let_go(self.at)
            self._mapped = None
            self.at = self.end = left = 0
            self._make(_PIECE_BYTES)
        view = self.view
        if size > len(view):
            self._make(size)
        self.view[:left] = view[self.at : self.end]
        self.at, self.end = 0, left
        while self.end < len(self.view) and (more := self._file.readinto(self.view[self.end :])):
            self.end += more
        return self.end >= size

    def words(self, places: Integers, order: str, count: int) -> Words:
        """Numbers of four bytes at each place: [which, place]."""
        every = np.ndarray((self.end - 4 * count + 1,), f"V{4 * count}", self.view, strides=(1,))
        rows: Words = every[places].view(f"{order}u4").reshape(len(places), count).T
        return rows


def _read(file: Readable, name: str) -> Iterator[FrameBlock]:
    piece = _Piece(file)
    magic = bytes(piece.view[:4]) if piece.has(4) else b""
    if magic == _PCAPNG:
        yield from _pcapng(piece)
        return
    if magic not in _MAGIC:
        raise RefusedError(
            f"{name} is neither a pcap nor a pcapng file", hint="tcpdump -w or dumpcap write them"
        )
    if not piece.has(24):
        raise RefusedError(f"{name} ends within its header")
    yield from _pcap(piece, *_MAGIC[magic])


def _pcap(piece: _Piece, order: str, unit: float) -> Iterator[FrameBlock]:
    link = struct.unpack_from(order + "I", piece.view, 20)[0] & 0xFFFF
    size_at = struct.Struct(order + "8xI4x").unpack_from
    piece.at = 24
    while piece.has(16):
        size = 16 + size_at(piece.view, piece.at)[0]
        if size - 16 > _RECORD_MAX:
            raise _DamagedError(f"a frame of {size - 16} bytes")
        if not piece.has(size):
            return
        begins, behind = _records(piece, order, size_at)
        seconds, fraction, captured, length = piece.words(begins, order, 4)
        piece.at = behind
        yield _block(
            piece.view,
            begins + 16,
            captured.astype(np.int64),
            length.astype(np.int64),
            seconds + fraction * unit,
            np.full(len(begins), link),
        )


def _records(
    piece: _Piece, order: str, size_at: Callable[[memoryview, int], tuple[int, ...]]
) -> tuple[Integers, int]:
    """Where the piece's whole records begin, at least one, and what lies behind them."""
    found = _lanes(piece, order) if piece.short_records else None
    if found is None:
        places: list[int] = []
        view, at, last = piece.view, piece.at, piece.end - 16
        note = places.append
        for _ in range(_FRAMES_MAX):
            if at > last:
                break
            note(at)
            (size,) = size_at(view, at)
            at += size + 16
        found = np.array(places, np.int64), at
    begins, behind = found
    if behind > piece.end:
        begins, behind = begins[:-1], int(begins[-1])
    piece.short_records = behind - piece.at < _SHORT_BYTES * len(begins)
    return begins, behind


def _lanes(piece: _Piece, order: str) -> tuple[Integers, int] | None:
    """As ``_records``, from many places at once; None when they do not fit together.

    One record's length tells where the next begins, so a loop goes from one to the next. Here it goes along
    many lanes side by side, each begun where a record is guessed: at a time with the same high bytes
    as the first record's, which hold for minutes. A guess was right when the lane before ends on it.
    """
    high = 1 if order == "<" else 0
    at, last = piece.at, piece.end - 16
    mark = piece.buffer[at + high : at + high + 3]
    find = piece.buffer.find
    starts = [at]
    for begin in range(at + _LANE_BYTES, last, _LANE_BYTES):
        if (found := find(mark, begin, begin + _LANE_BYTES) - high) >= begin:
            starts.append(found)
    place = np.array(starts, np.int64)
    goal = np.append(place[1:], last + 1)
    sizes = np.ndarray((last + 2,), order + "u4", piece.buffer, 8, (1,))
    rows = [place]
    # A lane goes on behind its goal until all are there, which is cheaper than to hold it.
    while (place < goal).any():
        if len(rows) > _LANE_STEPS_MAX:
            return None
        for _ in range(_LANE_STEPS):
            place = np.minimum(place + 16 + sizes[place], last + 1)
            rows.append(place)
    lanes = np.array(rows).T
    inside = lanes < goal[:, None]
    arrived = lanes[np.arange(len(goal)), inside.sum(1)]
    if (arrived != goal).any():
        return None
    begins = lanes[inside]
    if len(begins) > _FRAMES_MAX:
        return begins[:_FRAMES_MAX], int(begins[_FRAMES_MAX])
    return begins, int(begins[-1]) + 16 + int(sizes[begins[-1]])


# -- pcapng --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Section:
    """A section of a pcapng file. links, units: of its interfaces; units in seconds."""

    order: str
    links: list[int]
    units: list[float]

    def interface(self, body: memoryview) -> None:
        self.links.append(struct.unpack_from(self.order + "H", body)[0])
        self.units.append(_resolution(bytes(body[8:]), self.order))


def _pcapng(piece: _Piece) -> Iterator[FrameBlock]:
    section = _Section("<", [], [])
    while piece.has(8):
        view, at = piece.view, piece.at
        kind = struct.unpack_from(section.order + "I", view, at)[0]
        if bytes(view[at : at + 4]) == _PCAPNG:
            if not piece.has(12):
                return
            view, at = piece.view, piece.at
            kind = _SECTION
            section = _Section("<" if bytes(view[at + 8 : at + 12]) == b"\x4d\x3c\x2b\x1a" else ">", [], [])
        size = struct.unpack_from(section.order + "I", view, at + 4)[0]
        if not 12 <= size <= _RECORD_MAX or size % 4:
            raise _DamagedError(f"a block of {size} bytes")
        if not piece.has(size):
            return
        view, at = piece.view, piece.at
        if kind == _PACKET and size >= 32:
            yield from _packets(piece, section)
            continue
        body = view[at + 8 : at + size - 4]
        if kind == _INTERFACE and len(body) >= 8:
            section.interface(body)
        elif kind == _SIMPLE and len(body) >= 4 and section.links:
            length = struct.unpack_from(section.order + "I", body)[0]
            yield block_of([_frame(0.0, length, bytes(body[4 : 4 + length]), section.links[0])])
        piece.at = at + size


def _packets(piece: _Piece, section: _Section) -> Iterator[FrameBlock]:
    """Enhanced packet blocks that follow each other, from ``piece.at`` on; the first is whole."""
    head = struct.Struct(section.order + "II").unpack_from
    places: list[int] = []
    sizes: list[int] = []
    view, at, last = piece.view, piece.at, piece.end - 32
    while at <= last and len(places) < _FRAMES_MAX:
        kind, size = head(view, at)
        # Anything odd is looked at where single blocks are.
        if kind != _PACKET or not 32 <= size <= _RECORD_MAX or size % 4 or at + size > piece.end:
            break
        places.append(at)
        sizes.append(size)
        at += size
    begins = np.array(places, np.int64)
    where, high, low, captured, length = piece.words(begins + 8, section.order, 5)
    piece.at = at
    links, units = np.array(section.links, np.int64), np.array(section.units, np.float64)
    known = where < len(links)
    where = where[known]
    stamp = high[known].astype(np.uint64) << np.uint64(32) | low[known]
    room = np.array(sizes, np.int64)[known] - 32
    if len(where):
        yield _block(
            view,
            begins[known] + 28,
            np.minimum(captured[known], room),
            length[known].astype(np.int64),
            stamp.astype(np.float64) * units[where],
            links[where],
        )


def _resolution(options: bytes, order: str) -> float:
    """The unit of an interface's time stamps (option 9), in seconds."""
    at = 0
    while at + 4 <= len(options):
        code, size = struct.unpack_from(order + "HH", options, at)
        if code == 0:
            break
        if code == 9 and size == 1 and at + 4 < len(options):
            value = options[at + 4]
            return float(2.0 ** -(value & 0x7F) if value & 0x80 else 10.0**-value)
        at += 4 + (size + 3 & ~3)
    return 1e-6


# -- frames --------------------------------------------------------------------------------


def _block(
    view: memoryview,
    offsets: NDArray[np.int64],
    captured: NDArray[np.int64],
    length: NDArray[np.int64],
    times_s: NDArray[np.float64],
    links: NDArray[np.int64],
) -> FrameBlock:
    block = FrameBlock(
        buffer=view,
        offsets=offsets,
        captured=captured,
        wire_lens=np.maximum(length, captured),
        times_s=times_s,
    )
    if (links == _ETHERNET).all():
        return block
    rows = zip(times_s.tolist(), length.tolist(), links.tolist(), strict=True)
    return block_of(
        _frame(at_s, wire_len, block.frame(index), link) for index, (at_s, wire_len, link) in enumerate(rows)
    )


def _frame(at_s: float, length: int, data: bytes, link: int) -> Frame:
    """Link types: 1 Ethernet, 0 108 loopback, 12 14 101 bare IP, 228 IPv4, 229 IPv6, 113 276 cooked."""
    if link == _ETHERNET:
        return Frame(at_s, max(length, len(data)), data)
    cut = {0: 4, 108: 4, 113: 16, 276: 20}.get(link, 0)
    data = data[cut:]
    first = data[0] >> 4 if data else 0
    if link not in (0, 108, 12, 14, 101, 228, 229, 113, 276) or first not in (4, 6):
        return Frame(at_s, 14, bytes(14))
    header = _FOUR if first == 4 else _SIX
    return Frame(at_s, max(length - cut, len(data)) + 14, header + data)

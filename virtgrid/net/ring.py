"""Frames of an interface, live, in a kernel ring.

The ring is AF_PACKET's TPACKET_V2 (packet(7), Documentation/networking/packet_mmap.rst) behind a
filter: eBPF where the kernel lets us, else the classic one. Its slots have one size, so the headers
of all waiting frames are columns of one array. Opened in the network namespace of the calling thread.

Frames are of up to 64 KB (segmentation offload), a slot is not. Of what is longer a slot has the
beginning, and the kernel queues the frame itself beside the ring (PACKET_COPY_THRESH): a reference, it
copies nothing. Who needs the rest reads it from there, most need not; what nobody has read goes with
the block. The queue is bounded, and a frame that found no room in it is cut.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import struct
import time
from collections import deque
from types import TracebackType
from typing import Final

import numpy as np

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.core.frames import FrameBlock, Integers
from virtgrid.net import filters
from virtgrid.net.packets import ETH_P_ALL, SO_RCVBUFFORCE, SOL_PACKET
from virtgrid.net.skipfilter import SkipFilter

_PACKET_RX_RING: Final = 5
_PACKET_STATISTICS: Final = 6
_PACKET_COPY_THRESH: Final = 7
_PACKET_VERSION: Final = 10
_TPACKET_V2: Final = 1
_STATUS_USER, _STATUS_COPY = 1, 2
_FRAME_BYTES: Final = 2048
_BLOCK_BYTES: Final = 1 << 18
RING_BYTES: Final = 32 << 20
#: Of the frames beside the ring, in memory that the traffic has taken already; the longest of them.
QUEUE_BYTES: Final = 32 << 20
_LONGEST_BYTES: Final = 1 << 17
BLOCK_FRAMES: Final = 1024
_OFFSET_S: Final = 0.1
#: tpacket2_hdr, as far as it is read. A VLAN tag the kernel has taken out of the frame stands behind
#: it, and is left there: the decoder passes over tags, and the length is the frame's without it.
_HEADER: Final = np.dtype(
    [("status", "=u4"), ("length", "=u4"), ("captured", "=u4"), ("mac", "=u2"), ("net", "=u2"),
     ("seconds", "=u4"), ("nanoseconds", "=u4")]
)  # fmt: skip


class PacketRing:
    """A TPACKET_V2 ring on one interface; close it, or use it as a context manager.

    interface: its name in the calling thread's network namespace. Needs CAP_NET_RAW.
    capture: ``ebpf``, which can leave bodies in the kernel, or ``classic: `` and why not.
    Errors: NotFoundError (no such interface), RefusedError (not permitted, no memory for the ring).
    """

    def __init__(self, interface: str, *, ring_bytes: int = RING_BYTES) -> None:
        self.interface = interface
        self._next = 0
        self._lent: slice | Integers | None = None
        #: Of the block that is lent: the frames that are in the queue too and have not been taken from it.
        self._queued: deque[int] = deque()
        self._long = bytearray(_LONGEST_BYTES)
        self._error = 0
        self._skipped: set[bytes] = set()
        blocks = max(1, ring_bytes // _BLOCK_BYTES)
        self._frames = blocks * (_BLOCK_BYTES // _FRAME_BYTES)
        with contextlib.ExitStack() as undo:
            try:
                # Protocol 0: nothing arrives before the filter and the interface are set.
                self._socket = undo.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
                self._filter, self.capture = _attach_filter(self._socket)
                if self._filter is not None:
                    undo.callback(self._filter.close)
                self._socket.setsockopt(SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
                self._socket.setsockopt(
                    SOL_PACKET,
                    _PACKET_RX_RING,
                    struct.pack("IIII", _BLOCK_BYTES, blocks, _FRAME_BYTES, self._frames),
                )
                self._socket.setsockopt(SOL_PACKET, _PACKET_COPY_THRESH, 1)
                with contextlib.suppress(PermissionError):  # then there is room for a few
                    # The kernel doubles it.
                    self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUE_BYTES // 2)
                self._ring = mmap.mmap(self._socket.fileno(), blocks * _BLOCK_BYTES)
                undo.callback(self._ring.close)
                self._socket.bind((interface, ETH_P_ALL))
            except OSError as error:
                if not interface or error.errno in (6, 19):
                    raise NotFoundError(f"no network interface '{interface}' to capture on") from error
                raise RefusedError(
                    f"cannot capture on '{interface}'",
                    cause=os.strerror(error.errno or 0),
                    hint="capturing needs root (CAP_NET_RAW)",
                ) from error
            undo.pop_all()
        slots = np.ndarray((self._frames,), _HEADER, self._ring, strides=(_FRAME_BYTES,))
        self._columns = {name: slots[name] for name in _HEADER.names or ()}
        self._buffer = memoryview(self._ring)
        self._look_at_clock()

    def _look_at_clock(self) -> None:
        self._offset_s = _realtime_offset_s()
        self._offset_at_s = time.monotonic()

    def fileno(self) -> int:
        return self._socket.fileno()

    def read_block(self, limit: int = BLOCK_FRAMES) -> FrameBlock | None:
        """See capture.FrameSource; the block's frames lie in the ring itself."""
        self.release()
        limit = min(limit, self._frames)
        begin, stop = self._next, self._next + limit
        columns = self._columns
        # One stretch of slots, or where it goes over the ring's end, their numbers.
        slots = slice(begin, stop) if stop <= self._frames else np.arange(begin, stop) % self._frames
        status = columns["status"][slots]
        ready = status & _STATUS_USER
        count = limit if ready.all() else int(ready.argmin())
        if not count:
            # An interface that went down or away leaves its error here, and nowhere else.
            if error := self._error or self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            # The clock of the time stamps can be set while nothing arrives.
            if time.monotonic() > self._offset_at_s + _OFFSET_S:
                self._look_at_clock()
            return None
        slots = slice(begin, begin + count) if isinstance(slots, slice) else slots[:count]
        self._lent, self._next = slots, (begin + count) % self._frames
        self._queued.extend(np.flatnonzero(status[:count] & _STATUS_COPY).tolist())
        numbers = np.arange(begin, begin + count) if isinstance(slots, slice) else slots
        return FrameBlock(
            buffer=self._buffer,
            offsets=numbers * _FRAME_BYTES + columns["mac"][slots],
            captured=columns["captured"][slots].astype(np.int64),
            wire_lens=columns["length"][slots].astype(np.int64),
            times_s=columns["seconds"][slots] - self._offset_s + columns["nanoseconds"][slots] * 1e-9,
            whole=self._whole if self._queued else None,
        )

    def _whole(self, index: int) -> memoryview:
        """See FrameBlock."""
        queued = self._queued
        while queued and queued[0] < index:
            self._take(1)
        return memoryview(self._long)[: self._take(_LONGEST_BYTES) if queued and queued[0] == index else 0]

    def _take(self, most: int) -> int:
        """Take the oldest frame from the queue, into ``_long``; how many of its bytes that were."""
        self._queued.popleft()
        for _ in range(2):
            try:
                return self._socket.recv_into(self._long, most, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:  # the interface's end, told once to whoever reads first
                self._error = error.errno or errno.ENETDOWN
        return 0

    def release(self) -> None:
        """See capture.FrameSource."""
        while self._queued:
            self._take(1)
        if self._lent is not None:
            self._columns["status"][self._lent] = 0
            self._lent = None

    def skip(self, key: bytes, begin: int, end: int) -> None:
        """See capture.FrameSource."""
        if self._filter is None:
            return
        try:
            self._filter.skip(key, begin, end)
        except OSError:
            end = begin  # no room in the kernel: then all of it is delivered
        if begin == end:
            self._skipped.discard(key)
        else:
            self._skipped.add(key)

    def skipped(self) -> list[tuple[bytes, int]]:
        """See capture.FrameSource."""
        out = []
        for key in self._skipped if self._filter is not None else ():
            assert self._filter is not None
            if (seq := self._filter.reached(key)) is not None:
                out.append((key, seq))
        return out

    def drops(self) -> int:
        """See FrameSource; the kernel's own count, reset by reading."""
        _, dropped = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, _PACKET_STATISTICS, 8))
        return int(dropped)

    def close(self) -> None:
        self._columns = {}
        self._buffer.release()
        # A block that somebody still holds keeps the memory until it goes.
        with contextlib.suppress(BufferError):
            self._ring.close()
        if self._filter is not None:
            self._filter.close()
        self._socket.close()

    def __enter__(self) -> PacketRing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _attach_filter(sock: socket.socket) -> tuple[SkipFilter | None, str]:
    """eBPF, or where that is refused (privileges, lockdown, an old kernel) the classic filter."""
    try:
        skipping = SkipFilter()
    except OSError as error:
        filters.attach(sock, filters.tcp_filter())
        return None, f"classic: {error.strerror}"
    try:
        skipping.attach(sock)
    except OSError as error:
        skipping.close()
        filters.attach(sock, filters.tcp_filter())
        return None, f"classic: {error.strerror}"
    return skipping, "ebpf"


def _realtime_offset_s() -> float:
    """CLOCK_REALTIME minus CLOCK_MONOTONIC; the tightest of a few readings."""
    best = (float("inf"), 0.0)
    for _ in range(5):
        before = time.monotonic()
        real = time.time()
        after = time.monotonic()
        best = min(best, (after - before, real - (before + after) / 2))
    return best[1]

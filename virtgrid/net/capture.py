"""A thread that keeps a tracker fed with the frames of a tap.

``FrameSource`` is the seam: whatever yields frames with times on CLOCK_MONOTONIC can feed a watcher;
ring.py has the one for live interfaces.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Generic, Protocol, TypeVar

from virtgrid.core.clock import Clock
from virtgrid.core.frames import FrameBlock
from virtgrid.net.addresses import GuestAddresses, parse_mac
from virtgrid.net.ring import BLOCK_FRAMES, PacketRing

#: At 100,000 frames a second, a quarter of the ring; at 3,000 requests a second, a block worth its columns.
_GATHER_S: Final = 0.04
_BLOCKS_MAX: Final = 32
#: How often a skipped transfer's progress is asked for: well below every silence a verdict waits for.
_PROGRESS_S: Final = 0.25

SnapshotT = TypeVar("SnapshotT", covariant=True)
ChangeT = TypeVar("ChangeT")


class Follower(Protocol[SnapshotT, ChangeT]):
    """What frames are fed to; ``virtgrid.tracker.tracker.Tracker`` is one (net and tracker do not meet)."""

    @property
    def unsuitable(self) -> int: ...

    @property
    def server_ports(self) -> set[int]: ...

    def feed_block(self, block: FrameBlock) -> None: ...

    def tick(self, now_s: float) -> None: ...

    def frames_lost(self, at_s: float) -> None: ...

    def unsuitable_at(self, at_s: float) -> int | None: ...

    def snapshot(self, now_s: float) -> SnapshotT: ...

    def changes(self) -> list[ChangeT]: ...

    def skips(self) -> Sequence[tuple[bytes, int, int]]: ...

    def skipped(self, key: bytes, seq: int, at_s: float) -> None: ...


class FrameSource(Protocol):
    """Where frames come from.

    capture: how, for people (``ebpf``, ``classic: Operation not permitted``).
    """

    capture: str

    def fileno(self) -> int:
        """Readable when frames wait."""

    def read_block(self, limit: int = BLOCK_FRAMES) -> FrameBlock | None:
        """The frames that wait, without blocking; None when there are none.

        Fewer than ``limit`` are all of them.

        Times are on CLOCK_MONOTONIC. A block is valid until the next call.
        Errors: OSError (ENETDOWN, ENODEV, ENXIO) once the interface is gone.
        """

    def release(self) -> None:
        """The last block has been read: its memory may be used again."""

    def drops(self) -> int:
        """Frames lost since the last call for want of room."""

    def skip(self, key: bytes, begin: int, end: int) -> None:
        """Segments of a direction that end within [begin, end) may be left out; empty: none any more.

        key: its addresses and ports as in its packets. A source that cannot does nothing.
        """

    def skipped(self) -> Sequence[tuple[bytes, int]]:
        """Of each direction that is skipped, the sequence number behind what was left out last."""

    def close(self) -> None: ...


class TapWatcher(Generic[SnapshotT, ChangeT]):
    """Feeds a tracker from a source in its own thread; every method may be called from any thread.

    interface: the tap, in the calling thread's network namespace. guest_mac: ``52:54:00:...``; None
    watches whatever passes. clock: the one whose monotonic times the frames are compared with.
    capture: how the frames are had (FrameSource).
    state: ``watching``, ``gone`` (the interface disappeared: the guest stopped or moved) or ``closed``.
    Errors: NotFoundError, RefusedError from opening; ValueError for a malformed MAC.
    """

    def __init__(
        self,
        interface: str,
        guest_mac: str | None,
        tracker: Follower[SnapshotT, ChangeT],
        clock: Clock,
        *,
        source: FrameSource | None = None,
    ) -> None:
        self.interface = interface
        self._addresses = GuestAddresses(parse_mac(guest_mac) if guest_mac else None)
        self._tracker = tracker
        self._clock = clock
        self._source: FrameSource = source if source is not None else PacketRing(interface)
        self._lock = threading.Lock()
        self._dropped = 0
        self._asked_s = float("-inf")
        self.capture = self._source.capture
        self.state = "watching"
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"watch-{interface}", daemon=True)
        self._thread.start()

    # -- questions -------------------------------------------------------------------------

    def snapshot(self) -> SnapshotT:
        """All connections now, with everything that has arrived taken into account."""
        with self._lock:
            now_s = self._drain()
            return self._tracker.snapshot(now_s)

    def unsuitable(self) -> int:
        """Unsuitable and unknown connections now."""
        with self._lock:
            self._drain()
            return self._tracker.unsuitable

    def unsuitable_at(self, at_s: float) -> int | None:
        """The same at a moment of the last 30 s (CLOCK_MONOTONIC); None when it is too long ago."""
        with self._lock:
            self._drain()
            return self._tracker.unsuitable_at(at_s)

    def drain_events(self) -> list[ChangeT]:
        """The verdict changes since the last call, oldest first."""
        with self._lock:
            self._drain()
            return self._tracker.changes()

    @property
    def guest_addresses(self) -> tuple[str, ...]:
        """IPv4 and IPv6 addresses seen as sources of the guest, in the order they appeared."""
        with self._lock:
            return tuple(self._addresses.known)

    @property
    def server_ports(self) -> frozenset[int]:
        """Ports on which the guest answers."""
        with self._lock:
            return frozenset(self._tracker.server_ports)

    @property
    def dropped(self) -> int:
        """Frames the ring had no room for, in all."""
        return self._dropped

    def close(self) -> None:
        """End the thread and the capture; the last state can still be asked for."""
        if self.state == "closed":
            return
        os.write(self._wake_write, b"x")
        self._thread.join(timeout=10)
        with self._lock:
            self.state = "closed"
            self._source.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> TapWatcher[SnapshotT, ChangeT]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._source.fileno(), select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while True:
            ready = poll.poll(100)
            if any(fd == self._wake_read for fd, _ in ready):
                return
            with self._lock:
                self._drain()
                if self.state == "gone":
                    return
            if any(event & select.POLLIN for _, event in ready):
                # Let frames gather: a wake-up for each would cost more than their reading. Questions
                # do not wait for that, they drain the ring themselves.
                time.sleep(_GATHER_S)

    def _drain(self) -> float:
        """Read until nothing waits; returns the time up to which everything is known. Under the lock."""
        now_s = self._clock.monotonic_s()
        if self.state != "watching":
            self._tracker.tick(now_s)
            return now_s
        tracker = self._tracker
        # Bounded: on a saturated tap the questioner gets the state of a moment ago, not never.
        for _ in range(_BLOCKS_MAX):
            try:
                block = self._source.read_block()
            except OSError:
                self.state = "gone"
                break
            if block is None:
                break
            self._addresses.learn(block)
            tracker.feed_block(block)
            if len(block) < BLOCK_FRAMES:
                self._source.release()
                break
        if self.state == "watching" and (lost := self._source.drops()):
            self._dropped += lost
            tracker.frames_lost(self._clock.monotonic_s())
        # The time from before the reading: a frame that came since must not find its silence judged.
        tracker.tick(now_s)
        # First what is over, then how far the others have come: a key may be a new connection's by now.
        for skip in tracker.skips():
            self._source.skip(*skip)
        if now_s >= self._asked_s + _PROGRESS_S:
            self._asked_s = now_s
            for key, seq in self._source.skipped():
                tracker.skipped(key, seq, now_s)
        return now_s

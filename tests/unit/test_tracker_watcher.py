"""The watcher keeps a tracker fed from any source of frames, and says so when the source has gone."""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Iterator

import pytest
from tracker_wire import GUEST_MAC, Talk, get, response

from virtgrid.core.clock import SystemClock
from virtgrid.core.frames import FrameBlock, block_of
from virtgrid.migration.watch import capture_note
from virtgrid.net.capture import TapWatcher
from virtgrid.tracker.tracker import Change, Tracker
from virtgrid.tracker.views import Snapshot, Verdict


class Source:
    """Frames from a list; an eventfd makes it readable."""

    capture = "list"

    def __init__(self) -> None:
        self.waiting: deque[tuple[float, int, bytes]] = deque()
        self.lost = 0
        self.gone = False
        self.closed = False
        self.skips: list[tuple[bytes, int, int]] = []
        self.reached: dict[bytes, int] = {}
        self._event = os.eventfd(0, os.EFD_NONBLOCK)

    def put(self, *frames: tuple[float, int, bytes]) -> None:
        self.waiting.extend(frames)
        os.eventfd_write(self._event, 1)

    def fileno(self) -> int:
        return self._event

    def read_block(self, limit: int = 1024) -> FrameBlock | None:
        if not self.waiting and self.gone:
            raise OSError(errno.ENODEV, "gone")
        frames = [self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))]
        return block_of(frames) if frames else None

    def release(self) -> None:
        pass

    def skip(self, key: bytes, begin: int, end: int) -> None:
        self.skips.append((key, begin, end))

    def skipped(self) -> list[tuple[bytes, int]]:
        return list(self.reached.items())

    def drops(self) -> int:
        lost, self.lost = self.lost, 0
        return lost

    def close(self) -> None:
        self.closed = True
        os.close(self._event)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def watcher(source: Source) -> Iterator[TapWatcher[Snapshot, Change]]:
    tracker = Tracker(guest_macs=[GUEST_MAC])
    with TapWatcher("tap0", "52:54:00:00:00:01", tracker, SystemClock(), source=source) as watcher:
        yield watcher
    assert source.closed


def conversation(source: Source, *, answered: bool) -> None:
    talk = Talk(Tracker()).open().ask(get())
    if answered:
        talk.answer(response(0))
    now_s = time.monotonic()
    source.put(*((now_s, length, data) for data, length in talk.sent))


def test_a_question_takes_all_that_has_arrived_into_account(
    source: Source, watcher: TapWatcher[Snapshot, Change]
) -> None:
    conversation(source, answered=False)
    assert watcher.unsuitable() == 1
    assert watcher.unsuitable_at(time.monotonic() - 10) == 0
    assert watcher.unsuitable_at(time.monotonic()) == 1
    assert [c.verdict for c in watcher.drain_events()] == ["unsuitable"]
    assert watcher.guest_addresses == ("10.0.0.1",)
    assert watcher.server_ports == {80}


def test_lost_frames_make_connections_unknown(source: Source, watcher: TapWatcher[Snapshot, Change]) -> None:
    conversation(source, answered=True)
    assert watcher.unsuitable() == 0
    source.lost = 7
    assert [c.verdict for c in watcher.snapshot().connections] == [Verdict.UNKNOWN]
    assert watcher.dropped == 7


def test_a_source_that_has_gone_is_a_state_not_an_error(
    source: Source, watcher: TapWatcher[Snapshot, Change]
) -> None:
    conversation(source, answered=False)
    source.gone = True
    assert watcher.unsuitable() == 1
    assert watcher.unsuitable() == 1
    assert watcher.state == "gone"
    assert watcher.snapshot().total == 1
    watcher.close()
    watcher.close()
    assert watcher.state == "closed"


def test_the_source_is_told_what_it_may_leave_out_and_asked_how_far_that_has_come(
    source: Source, watcher: TapWatcher[Snapshot, Change]
) -> None:
    talk = Talk(Tracker()).open().ask(get()).answer(response(9 << 20) + b"x")
    now_s = time.monotonic()
    source.put(*((now_s, length, data) for data, length in talk.sent))
    assert watcher.unsuitable() == 0
    ((key, begin, end),) = source.skips
    assert end - begin == (9 << 20) - 2
    source.reached[key] = begin + (4 << 20)
    limit_s = time.monotonic() + 10
    while "5.0 MiB of 9.0 MiB left" not in watcher.snapshot().connections[0].reason:
        assert time.monotonic() < limit_s, watcher.snapshot()
    talk.reset(to_server=False)
    source.put((time.monotonic(), *talk.sent[-1][::-1]))
    assert watcher.snapshot().total == 0
    assert source.skips[1:] == [(key, 0, 0)]


def test_a_capture_without_ebpf_is_noted_with_its_reason(watcher: TapWatcher[Snapshot, Change]) -> None:
    assert watcher.capture == "list"
    assert capture_note("ebpf") is None
    assert "(Operation not permitted)" in (capture_note("classic: Operation not permitted") or "")

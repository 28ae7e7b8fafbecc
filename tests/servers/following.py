"""The live tracker on a server host's tap, with a recording of all frames to replay afterwards.

The recording is a capture of its own beside the ring: whole frames, where the ring cuts them. The
replay has to come to the same counts and the same last states all the same.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from checker import claims, clocked, errors

from virtgrid.core.clock import SystemClock
from virtgrid.lab.servers import layout
from virtgrid.lab.servers.host import ServerHost
from virtgrid.net.addresses import parse_mac
from virtgrid.net.capture import TapWatcher
from virtgrid.tracker.machine import Connection
from virtgrid.tracker.pcap import Frame, read_frames
from virtgrid.tracker.replay import Replayed, replay
from virtgrid.tracker.tracker import LARGE_BYTES, Change, Tracker, view
from virtgrid.tracker.views import ConnectionView, Snapshot, Verdict

WAIT_S = 20.0
_PROBE_S = 0.01
#: How well the two clocks of one moment are known.
_CLOCK_S = 0.002
#: TIME_WAIT, CLOSE and LISTEN, as /proc/net/tcp writes them.
_OVER = {"06", "07", "0A"}
_ETH_P_ALL = 3
_SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 33, 35


def until(condition: Callable[[], object], what: str, limit_s: float = WAIT_S) -> None:
    """Wait for a state, probing every 10 ms."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {limit_s} s for: {what}"
        time.sleep(_PROBE_S)


def until_quiet(host: ServerHost) -> None:
    """Wait until the connections of the test before are gone: nothing may come on them any more."""

    def live() -> int:
        lines = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path("/proc/thread-self/net", name).read_text().splitlines()[1:]
        ]
        return sum(line[3] not in _OVER for line in lines)

    until(lambda: not host.in_client(live), "the connections of the test before are gone")


class Recorder:
    """Writes every frame of an interface, whole, to a pcap file. Opened in the right namespace."""

    def __init__(self, interface: str, path: Path) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.bind((interface, _ETH_P_ALL))
        self._file = path.open("wb")
        self._file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 1 << 18, 1))
        self._frames = 0
        self._ended = False
        self._lock = threading.Lock()
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._run, name="recorder")
        self._thread.start()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while self._wake not in {descriptor for descriptor, _ in poller.poll()}:
            self.drain()

    def drain(self) -> int:
        """Write what has arrived; how many frames it was in all."""
        with self._lock:
            return self._drain()

    def ends_with(self, frames: int) -> bool:
        """End here, if so many frames are still all that came."""
        with self._lock:
            self._ended = self._drain() == frames
            return self._ended

    def _drain(self) -> int:
        with contextlib.suppress(BlockingIOError):
            while not self._ended:
                data, extra, _, _ = self._socket.recvmsg(1 << 17, 64)
                seconds, nanoseconds = struct.unpack("qq", extra[0][2])
                self._file.write(struct.pack("<IIII", seconds, nanoseconds, len(data), len(data)) + data)
                self._frames += 1
        return self._frames

    def close(self) -> None:
        """The file holds what ``drain`` has written."""
        os.write(self._woken, b"x")
        self._thread.join()
        self._socket.close()
        self._file.close()
        os.close(self._wake)
        os.close(self._woken)


class _Remembering(Tracker):
    """A tracker that keeps the last view of what has gone."""

    def __init__(self) -> None:
        super().__init__(guest_macs=[parse_mac(layout.GUEST_MAC)])
        self.gone: list[ConnectionView] = []

    def closed(self, conn: Connection, reason: str) -> None:
        self.gone.append(view(conn, conn.last_s))


@dataclass
class Following:
    """What the live tracker says. changes: every verdict change so far, in order."""

    watcher: TapWatcher[Snapshot, Change]
    capture: Path
    _tracker: _Remembering
    changes: list[Change] = field(default_factory=list)
    #: CLOCK_REALTIME less CLOCK_MONOTONIC: the recording's clock less the live tracker's.
    _realtime_s: float = field(default_factory=lambda: time.time() - time.monotonic())
    _last: list[ConnectionView] = field(default_factory=list)

    @staticmethod
    @contextmanager
    def on(host: ServerHost, capture: Path) -> Iterator[Following]:
        """Follow until the end of the block, which the connections need not reach."""
        tracker = _Remembering()

        def start() -> tuple[Recorder, TapWatcher[Snapshot, Change]]:
            recorder = Recorder(layout.TAP, capture)
            return recorder, TapWatcher(layout.TAP, layout.GUEST_MAC, tracker, SystemClock())

        recorder, watcher = host.in_client(start)
        following = Following(watcher, capture, tracker)
        try:
            with watcher:
                yield following
                # The last look and the recording's end are one moment: no frame came in between.
                while True:
                    frames = recorder.drain()
                    following._last = following.all()
                    if recorder.ends_with(frames):
                        break
                assert watcher.dropped == 0
        finally:
            recorder.close()

    # -- questions -----------------------------------------------------------------------------

    def open(self, port: int | None = None) -> list[ConnectionView]:
        """The connections there are, to this port of the guest."""
        found = self.watcher.snapshot().connections
        self.changes += self.watcher.drain_events()
        return [one for one in found if port is None or one.server.endswith(f":{port}")]

    def all(self, port: int | None = None) -> list[ConnectionView]:
        """Those that have ended, in that order, and those there are."""
        there = self.open(port)
        gone = [one for one in self._tracker.gone if port is None or one.server.endswith(f":{port}")]
        return [*gone, *there]

    def only(self, port: int | None = None) -> ConnectionView:
        (one,) = self.all(port)
        return one

    def reason(self, port: int | None = None) -> str:
        """The reason of the only connection; empty while there is none."""
        return next((one.reason for one in self.open(port)), "")

    def verdicts(self, port: int) -> list[str]:
        """The verdicts of the connections to a port, as they changed."""
        self.open()
        return [one.verdict for one in self.changes if one.server.endswith(f":{port}")]

    # -- waiting -------------------------------------------------------------------------------

    def until_state(self, state: str, port: int | None = None) -> ConnectionView:
        """Wait until the only open connection is in this state."""
        until(lambda: [one.state for one in self.open(port)] == [state], f"{state}; {self.reason(port)}")
        return self.open(port)[0]

    def until_counted(self, requests: int, responses: int, port: int | None = None) -> ConnectionView:
        """Wait until the connections together have these counts; the last of them."""

        def counted() -> tuple[int, int]:
            seen = self.all(port)
            return sum(one.requests for one in seen), sum(one.responses for one in seen)

        end_s = time.monotonic() + WAIT_S
        while counted() != (requests, responses):
            assert time.monotonic() < end_s, f"counted {counted()}, not {(requests, responses)}"
            time.sleep(_PROBE_S)
        return self.all(port)[-1]

    def until_suitable(self, port: int | None = None) -> None:
        """Wait until there are connections and none of them is unsuitable."""

        def suitable() -> bool:
            there = self.open(port)
            return bool(there) and all(one.suitable for one in there)

        until(suitable, f"suitable; {self.reason(port)}")

    def until_unsuitable(self, reason: str, port: int | None = None) -> ConnectionView:
        """Wait until an open connection is unsuitable for a reason with these words."""

        def found() -> list[ConnectionView]:
            return [one for one in self.open(port) if not one.suitable and reason in one.reason]

        end_s = time.monotonic() + WAIT_S
        while not (there := found()):
            assert time.monotonic() < end_s, f"'{reason}' did not come: {self.reason(port)}"
            time.sleep(_PROBE_S)
        return there[0]

    def until_closed(self, count: int = 1, port: int | None = None) -> list[ConnectionView]:
        """Wait until so many connections have ended and none is left; their last views."""
        until(lambda: not self.open(port) and len(self.all(port)) >= count, f"{count} connections to end")
        return self.all(port)

    # -- afterwards ----------------------------------------------------------------------------

    def replayed(self) -> list[Replayed]:
        """The recording through the offline tracker."""
        return replay(self._frames())

    def _frames(self) -> list[Frame]:
        with self.capture.open("rb") as file:
            return list(read_frames(file, str(self.capture)))

    def _live_lines(self) -> dict[tuple[str, str], list[Change]]:
        """The live changes by connection, on the clock of ``clocked``."""
        frames = self._frames()
        shift_s = self._realtime_s - (frames[0].at_s if frames else 0.0) + 1.0
        lines: dict[tuple[str, str], list[Change]] = {}
        for change in self.changes:
            line = lines.setdefault((change.client, change.server), [])
            line.append(change._replace(at_s=change.at_s + shift_s))
        return lines

    def check_waiting(self) -> None:
        """Neither live nor replayed was a waiting client called suitable.

        Who waited when is said by the checker of the public captures, which shares no code with the tracker.
        """
        frames = clocked(self._frames())
        waited = claims(frames, LARGE_BYTES)
        lines = {(one.view.client, one.view.server): one.timeline for one in replay(frames)}
        assert errors(waited, lines) == []
        wrong = errors(waited, self._live_lines())
        assert [one for one in wrong if one.until_s - one.from_s > _CLOCK_S] == []

    def check_replay(self) -> None:
        """Besides, the recording, replayed, comes to what was seen live."""
        self.check_waiting()
        live = {(one.client, one.server): one for one in self._last}
        offline = {(one.view.client, one.view.server): one.view for one in self.replayed()}
        assert offline.keys() == live.keys()
        for key, one in offline.items():
            assert _essence(one) == _essence(live[key])


def _essence(one: ConnectionView) -> dict[str, object]:
    # The verdict is left out: the states by silence depend on when one looks.
    names = (
        "protocol", "state", "requests", "responses", "large_transfers", "gaps", "bytes_to_client",
        "bytes_to_server",
    )  # fmt: skip
    return {name: getattr(one, name) for name in names}


__all__ = ["Following", "Recorder", "Verdict", "until", "until_quiet"]

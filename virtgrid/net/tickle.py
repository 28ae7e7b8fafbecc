"""Tickling a guest: a few small frames to its tap every few tens of ms, from a process of its own.

A frame's arrival makes the guest's network driver write a page of its receive ring, which keeps
a quiet guest's precopy from completing under the clamp (virt/switchover.py). It carries an
ethertype for local experiments (IEEE 802, 0x88B5), which no stack answers.

A process, not a thread: the hold must not depend on how busy the controller is. It ends with its
parent, because its standard input ends then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
from types import TracebackType
from typing import Final

from virtgrid.core.process import be_real_time
from virtgrid.net.packets import EXPERIMENTAL_ETHERTYPE

INTERVAL_S: Final = 0.025
#: Frames at a time. A window needs one page written. These write some thirty, more than a window lets out,
#: so that what a sync finds lasts for two or three windows in which QEMU or the guest may be late; more
#: frames would only be more to send in the pause.
BURST: Final = 4
#: Longer than any hold; a tickler nobody ended ends itself.
_LIFETIME_S: Final = 7 * 86400.0
#: The tap is gone, and the guest with it.
_GONE: Final = frozenset({errno.ENODEV, errno.ENXIO, errno.ENETDOWN})


def frame(mac: str) -> bytes:
    """A minimal Ethernet frame to ``mac`` from a locally administered address."""
    destination = bytes.fromhex(mac.replace(":", ""))
    if len(destination) != 6:
        raise ValueError(f"not a MAC address: {mac!r}")
    return destination + b"\x02vgtic" + EXPERIMENTAL_ETHERTYPE.to_bytes(2, "big") + b"\0" * 46


class Tickler:
    """Tickles ``mac`` on ``tap`` between ``start()`` and ``stop()``; a context manager stops it."""

    def __init__(self, tap: str, mac: str) -> None:
        self._tap = tap
        self._mac = mac
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "virtgrid.net.tickle", self._tap, self._mac],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def keep_running(self) -> bool:
        """Start it again if it has ended by itself; True when it had."""
        if self._process is None or self.running:
            return False
        self.stop()
        self.start()
        return True

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Tickler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def burst(raw: socket.socket, payload: bytes) -> bool:
    """Send one burst; False when the tap is gone."""
    try:
        for _ in range(BURST):
            raw.send(payload)
    except OSError as error:
        # Else its queue is full (EAGAIN, ENOBUFS): QEMU was late, and what is queued will be read.
        return error.errno not in _GONE
    return True


def _main(tap: str, mac: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to judge
    # A frame late by more than QEMU's 100 ms window can lose the hold.
    be_real_time()
    payload = frame(mac)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.setblocking(False)
        raw.bind((tap, 0))
        for _ in range(round(_LIFETIME_S / INTERVAL_S)):
            if select.select([sys.stdin], [], [], INTERVAL_S)[0] and not os.read(0, 1):
                return
            if not burst(raw, payload):
                return


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])

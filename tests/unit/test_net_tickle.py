"""The tickler goes on while QEMU is late, ends with the tap, and is started again when it ended."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from virtgrid.net.tickle import BURST, Tickler, burst


class Tap:
    """Takes some frames, then fails as a tap does."""

    def __init__(self, takes: int, number: int = 0) -> None:
        self.takes = takes
        self.number = number
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> int:
        if len(self.sent) == self.takes:
            raise OSError(self.number, "as told")
        self.sent.append(data)
        return len(data)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOBUFS])
def test_a_full_queue_does_not_end_it(number: int) -> None:
    tap: Any = Tap(BURST - 1, number)
    assert burst(tap, b"x") is True
    assert len(tap.sent) == BURST - 1


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENXIO, errno.ENETDOWN])
def test_it_ends_with_the_tap(number: int) -> None:
    tap: Any = Tap(0, number)
    assert burst(tap, b"x") is False


def test_one_that_died_is_started_again_and_one_that_runs_is_left_alone() -> None:
    with Tickler("no-such-tap", "52:54:00:00:00:01") as tickler:
        assert not tickler.keep_running(), "never started"
        tickler.start()
        process = tickler._process
        assert process is not None
        process.kill()
        process.wait()
        assert tickler.keep_running()
        assert tickler._process is not process
    assert not tickler.keep_running(), "stopped on purpose"

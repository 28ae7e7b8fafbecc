"""Keys and Ctrl-C while something is shown: single presses, and interrupts counted, not thrown."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator

from virtgrid.cli.output import interactive


@contextlib.contextmanager
def key_presses() -> Iterator[Callable[[], str]]:
    """Single key presses while a person watches; the terminal is put back afterwards."""
    if not (sys.stdin.isatty() and interactive()):
        yield lambda: ""
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed() -> str:
        ready = select.select([descriptor], [], [], 0)[0]
        return os.read(descriptor, 1).decode("ascii", "replace").lower() if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class Interrupts:
    """Ctrl-C counted instead of thrown: the first asks for a safe end, the second lets it run alone."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_: object) -> None:
        self.count += 1

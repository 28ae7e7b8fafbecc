"""Bytes as they arrive, cut into lines of bounded length. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from virtgrid.wire.message import LINE_LIMIT_BYTES

_END: Final = b"\n"


class LineTooLongError(ValueError):
    """A line passed the limit before its end came. What follows cannot be told apart: hang up."""


@dataclass(slots=True)
class LineCutter:
    """Collects bytes and gives whole lines, without their ends; empty lines are left out.

    Never holds more than ``limit_bytes`` and what one ``feed`` brought. What is in ``rest`` when the
    other side hangs up is half a line: it was never a message.
    """

    limit_bytes: int = LINE_LIMIT_BYTES
    rest: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that ``data`` completes. Errors: LineTooLongError; the cutter is then useless.

        Lines before the long one in the same data are lost with it: the other side broke the rules.
        """
        # Only what is new can hold an end: a long line costs its length once, not its square.
        if _END not in data:
            self.rest += data
            self._check(len(self.rest))
            return []
        head, *middle, tail = data.split(_END)
        lines = [bytes(self.rest) + head, *middle]
        self.rest = bytearray(tail)
        for line in (*lines, tail):
            self._check(len(line))
        return [line for line in (one.removesuffix(b"\r") for one in lines) if line]

    def _check(self, count: int) -> None:
        if count >= self.limit_bytes:
            raise LineTooLongError(f"a line is longer than {self.limit_bytes} bytes")

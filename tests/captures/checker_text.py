"""What the checker's readers share: a cursor in a direction's bytes, and what they write down.

Where a reader is not certain how to go on, it raises Stop with the byte from which on it is not.
That is not the tracker's fault, and the checker then claims nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from checker_flows import INF, Flow


class Stop(Exception):
    """From this byte of this direction on, nothing is certain."""

    def __init__(self, flow: Flow, offset: int) -> None:
        super().__init__(offset)
        self.flow = flow
        self.offset = offset

    @property
    def at_s(self) -> float:
        return self.flow.at(self.offset)


class More(Exception):
    """The direction ends in the middle of something."""


@dataclass(slots=True)
class Asked:
    """A request, outstanding from ``from_s`` until ``until_s``.

    large: its bodies, (size, from, until): while one that is large was under way, it is excused.
    data: from, until and announced size of a transfer on a connection of its own (FTP).
    """

    what: str
    from_s: float
    until_s: float = INF
    large: list[tuple[int, float, float]] = field(default_factory=list)
    data: tuple[float, float, int] | None = None


@dataclass(slots=True)
class Book:
    """What a reader found; certain_until_s: where it stopped.

    large: the answers' bodies; a large one excuses all that is outstanding, for what is under way
    from the server always belongs to the oldest.
    """

    protocol: str = ""
    asked: list[Asked] = field(default_factory=list)
    large: list[tuple[int, float, float]] = field(default_factory=list)
    certain_until_s: float = INF


class Cursor:
    """A place in one direction."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.at = 0

    @property
    def left(self) -> bool:
        return self.at < len(self.flow.data)

    @property
    def now_s(self) -> float:
        """When the byte at the cursor came."""
        return self.flow.at(self.at)

    @property
    def last_s(self) -> float:
        """When the byte before the cursor came."""
        return self.flow.at(self.at - 1)

    def line(self) -> bytes:
        """The next line, without its end."""
        end = self.flow.data.find(b"\n", self.at)
        stop = len(self.flow.data) if end < 0 else end + 1
        if self.flow.unseen_within(self.at, stop):
            raise Stop(self.flow, self.at)
        if end < 0:
            raise More
        line = bytes(self.flow.data[self.at : end])
        self.at = stop
        return line.removesuffix(b"\r")

    def skip(self, count: int) -> bool:
        """Step over a counted body; False when it is not all there."""
        self.at += count
        return self.at <= len(self.flow.data)

    def dotted(self) -> bool:
        """Step over lines up to the one with a single dot; False when that is not there."""
        begin = self.at
        data = self.flow.data
        if data.startswith(b".\r\n", begin):
            self.at = begin + 3
        else:
            end = data.find(b"\r\n.\r\n", begin)
            self.at = len(data) if end < 0 else end + 5
            if end < 0:
                if self.flow.unseen_within(begin, self.at):
                    raise Stop(self.flow, begin)
                return False
        if self.flow.unseen_within(begin, self.at):
            raise Stop(self.flow, begin)
        return True

"""Numbered notifications that outlive the line they go over: what each end keeps. Pure.

The theory. The sender numbers its notifications 1, 2, 3 … and keeps each until the receiver has said
"done up to n" (an acknowledgement). The receiver takes number n+1 after n and nothing else. When a line
drops, the sender forgets which it has written, and the receiver says on the next line after which number
to go on. So

* nothing is lost: what was not acknowledged is still kept;
* nothing comes twice: the receiver leaves out what it has had;
* nothing comes out of order: a gap is refused, and the line with it.

Two kinds of notification. *Durable* ones (a change of state) must survive the death of the sender's
process, so the sender writes them down with their numbers before it sends them. *Passing* ones (a piece
of output) live in memory only: a program whose pilot was killed has lost its output anyway. After such a
death the sender is another *incarnation*: numbers of passing ones are missing for ever, and the receiver
must accept the gap. Numbers are never used twice: a new incarnation begins above every number the old one
can have used.

Back-pressure: passing notifications wait for room. A receiver that does not acknowledge stops the sender's
sources; durable ones are few and always have room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

ROOM_BYTES: Final = 1 << 20
"""How much may be kept for a receiver that does not acknowledge before passing notifications wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A numbered notification. kind: what it tells; body: the rest, as JSON knows it."""

    number: int
    kind: str
    body: Mapping[str, Any]
    durable: bool = True
    size_bytes: int = 0


class OutOfStepError(ValueError):
    """The other side speaks of numbers that cannot be: one of the two has lost its memory."""


@dataclass(slots=True)
class Outbox:
    """The sender's half. last: the highest number given; acknowledged: all up to here have arrived."""

    last: int = 0
    acknowledged: int = 0
    room_bytes: int = ROOM_BYTES
    _kept: deque[Note] = field(default_factory=deque)
    _size: int = 0

    @staticmethod
    def restored(last: int, acknowledged: int, durable: Iterable[Note]) -> Outbox:
        """As another incarnation finds it: the durable notes, and numbers that go on above ``last``."""
        box = Outbox(last=last, acknowledged=acknowledged)
        box._kept.extend(sorted(durable, key=lambda note: note.number))
        return box

    def put(self, kind: str, body: Mapping[str, Any], *, durable: bool = True, size_bytes: int = 0) -> Note:
        """Number a notification and keep it. Passing ones ask ``has_room`` first."""
        self.last += 1
        note = Note(number=self.last, kind=kind, body=body, durable=durable, size_bytes=size_bytes)
        self._kept.append(note)
        self._size += size_bytes
        return note

    def take_back(self, note: Note) -> None:
        """Undo the last ``put``, before anybody has seen the note: what it tells did not come to be."""
        if self._kept and self._kept[-1] is note:
            self._kept.pop()
            self._size -= note.size_bytes
            self.last -= 1

    def has_room(self) -> bool:
        """Whether a passing notification may be put now. One piece may pass the limit, not two."""
        return self._size < self.room_bytes

    def after(self, number: int, *, limit: int = 64) -> list[Note]:
        """What follows ``number``, at most ``limit`` of it, in order."""
        found: list[Note] = []
        for note in self._kept:
            if note.number > number:
                found.append(note)
                if len(found) == limit:
                    break
        return found

    def acknowledge(self, number: int) -> bool:
        """All up to ``number`` have arrived. False when that was known. Errors: OutOfStepError."""
        if number > self.last:
            raise OutOfStepError(f"notification {number} was acknowledged, but the last was {self.last}")
        if number <= self.acknowledged:
            return False
        self.acknowledged = number
        while self._kept and self._kept[0].number <= number:
            self._size -= self._kept.popleft().size_bytes
        return True

    def durable(self) -> list[Note]:
        """The durable ones that have not been acknowledged: what must be written down."""
        return [note for note in self._kept if note.durable]

    @property
    def empty(self) -> bool:
        """Whether everything has arrived."""
        return not self._kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a sender stands when a line begins.

    incarnation: 1, and one more after each death. base: the numbers up to here were given by the dead; of
    those only the durable ones are left. acknowledged: what it has heard of the receiver.
    """

    incarnation: int
    base: int
    acknowledged: int


@dataclass(slots=True)
class Inbox:
    """The receiver's half. taken: the highest number it has had; missing: how many died with an
    incarnation.
    """

    taken: int = 0
    incarnation: int = 0
    missing: int = 0
    _base: int = 0

    def hello(self, sender: Standing) -> int:
        """A line begins; returns the number to go on after. Errors: OutOfStepError for an older incarnation.

        A receiver that has no memory of this sender believes it about what was acknowledged.
        """
        if sender.incarnation < self.incarnation:
            raise OutOfStepError(
                f"incarnation {sender.incarnation} speaks, but {self.incarnation} has spoken: two of a kind?"
            )
        if self.incarnation == 0:
            self.taken = max(self.taken, sender.acknowledged)
        self.incarnation, self._base = sender.incarnation, sender.base
        return self.taken

    def take(self, number: int) -> bool:
        """True: new, use it. False: had already. Errors: OutOfStepError for a gap that no death explains."""
        if number <= self.taken:
            return False
        gap = number - self.taken - 1
        if gap and number > self._base + 1:
            raise OutOfStepError(f"notification {number} came after {self.taken}: one is missing")
        self.missing += gap
        self.taken = number
        return True

"""The connections' verdicts as time goes by: judged anew with what happens, or when a silence is long enough.

The tracker (tracker.py) feeds it, by way of opening.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Final

from virtgrid.tracker.changes import Told
from virtgrid.tracker.connection import Connection
from virtgrid.tracker.counts import Counts
from virtgrid.tracker.definition import Definition
from virtgrid.tracker.judge import NEVER, SUITABLE, brief, judge
from virtgrid.tracker.machine import Machine
from virtgrid.tracker.quick import Quick
from virtgrid.tracker.streams import UNKNOWN, Stream, resync
from virtgrid.tracker.views import Verdict

if TYPE_CHECKING:
    from virtgrid.tracker.block import BlockRun

_CHANGES_MAX: Final = 1 << 16
#: A closing or never answered connection is forgotten after this silence.
LINGER_S: Final = 60.0
_WAITING_HOLE_S: Final = 30.0
#: So many timers of connections that are gone are no matter.
_TIMERS_FEW: Final = 1024


class Verdicts(ABC):
    """Connections, their timers and what they tell. Parameters: as the tracker's."""

    def __init__(
        self, definitions: Sequence[Definition], large_bytes: int, count_outgoing: bool, history_s: float
    ) -> None:
        self._machine = Machine(definitions, large_bytes)
        self._count_outgoing = count_outgoing
        # Ordered, because the first of a dict lie behind all that have been deleted before them.
        self.connections: OrderedDict[Connection, None] = OrderedDict()
        #: The connections' parts that a block works on (block.py), and the block at hand.
        self.streams: dict[bytes, Stream] = {}
        #: When, then in the order in which the frames set them.
        self.timers: list[tuple[float, tuple[int, int], Connection]] = []
        self.now_s = float("-inf")
        self.frames = 0
        self.segments = 0
        self.quick = Quick(self._machine, count_outgoing, self.turned)
        #: Whether anybody asks how verdicts change, and how many are unsuitable; a replay may not.
        self.tells = True
        self._run: BlockRun | None = None
        self._serial = count()
        self._unsuitable = Counts(history_s)
        self._changes: deque[Told] = deque(maxlen=_CHANGES_MAX)

    @abstractmethod
    def _close(self, conn: Connection, at_s: float, reason: str) -> None:
        """A connection is over."""

    def _related(self, conn: Connection, at_s: float) -> None:
        """A control connection and its data connection are judged by each other."""
        other = conn.owner or conn.data
        if other is not None and not other.closed:
            self._evaluate(other, at_s)

    def together(self, conn: Connection) -> None:
        """A connection and its relative are looked at: what a block holds back of them counts first."""
        if self._run is not None:
            for one in (conn, conn.owner, conn.data):
                if one is not None:
                    self._run.touch(one)

    def _evaluate(self, conn: Connection, now_s: float) -> None:
        if conn.owner is not None or conn.data is not None:
            self.together(conn)
        self._judged(conn, now_s, *judge(conn, now_s, self._count_outgoing))

    def _judged(self, conn: Connection, now_s: float, state: str, verdict: Verdict, due: float) -> None:
        """What the judge says of a connection, and when to ask again if nothing happens until then."""
        conn.dirty = False
        conn.state = state
        if verdict is not conn.verdict:
            before = conn.verdict
            conn.verdict = verdict
            conn.since_s = now_s
            if (before is None or before is SUITABLE) != (verdict is SUITABLE):
                self.counted(-1 if verdict is SUITABLE else 1, now_s)
            self.tell(conn, verdict, None, now_s)
        if state == "closing" or (due == NEVER and (conn.unwatched or (state == "new" and not conn.synack))):
            due = conn.last_s + LINGER_S
        elif conn.client.waiting or conn.server.waiting:
            since = min(s.waiting_since_s for s in (conn.client, conn.server) if s.waiting)
            due = min(due, since + _WAITING_HOLE_S)
        if due < conn.timer_s:
            conn.timer_s = due
            timers = self.timers
            if len(timers) > _TIMERS_FEW + 2 * len(self.connections):
                # Those of connections that are gone would keep them in memory until they are due.
                timers[:] = [t for t in timers if not t[2].closed and t[0] == t[2].timer_s]
                heapify(timers)
            run = self._run
            moment = 2 * self.frames + 1 if run is None else run.before + run.moment
            heappush(timers, (due, (moment, next(self._serial)), conn))

    def fire(self, now_s: float) -> None:
        """Let the timers go off that are due."""
        timers = self.timers
        while timers and timers[0][0] <= now_s:
            due, _, conn = heappop(timers)
            if conn.closed or due != conn.timer_s:
                continue
            conn.timer_s = NEVER
            self._machine.now_s, self._machine.ack = due, UNKNOWN
            self.together(conn)
            if due >= conn.last_s + LINGER_S and (
                conn.state == "closing" or not conn.synack or conn.unwatched
            ):
                why = "since nobody watched it" if conn.unwatched else "since its end began"
                self._close(conn, due, f"silent {why}")
                continue
            for stream in (conn.client, conn.server):
                if stream.waiting and due >= stream.waiting_since_s + _WAITING_HOLE_S:
                    resync(stream, self._machine)
            self._evaluate(conn, due)
            self._related(conn, due)

    def turned(self, conn: Connection, verdict: Verdict, at_s: float) -> None:
        """An ordinary connection has become suitable, or unsuitable."""
        self.counted(-1 if verdict is SUITABLE else 1, at_s)
        self.tell(conn, verdict, None, at_s)

    def tell(self, conn: Connection, verdict: Verdict, end: str | None, at_s: float) -> None:
        """A connection's verdict has changed, or it has gone and ``end`` says why."""
        if not self.tells:
            return
        client, server = conn.named or conn.names
        state = conn.state
        word: str = verdict if end is None else "closed"
        reason = brief(conn, state, verdict, at_s) if end is None else end
        self.changed(conn, (at_s, client, server, conn.label, word, reason, state))

    def changed(self, conn: Connection, told: Told) -> None:
        """A change, to be put into words; kept for ``changes``, or for others (replay.py).

        Those of a connection come in their order, those of several in a block may not.
        """
        if self._run is None:
            self._changes.append(told)
        else:
            self._run.keep(self._changes.append, told)

    def counted(self, by: int, at_s: float) -> None:
        """One connection more or less is unsuitable."""
        if not self.tells:
            return
        if self._run is None:
            self._unsuitable.step(by, at_s)
        else:
            self._run.keep(self._unsuitable.step, by, at_s)

"""A capture file through the tracker: every connection's last state, and its verdicts over time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from virtgrid.core.frames import FrameBlock
from virtgrid.tracker.definition import Definition
from virtgrid.tracker.machine import Connection
from virtgrid.tracker.pcap import Frame
from virtgrid.tracker.tracker import LARGE_BYTES, Change, Told, Tracker, view, worded
from virtgrid.tracker.views import ConnectionView, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One connection of a file. end: why it is over, or None; timeline: its verdict changes."""

    view: ConnectionView
    end: str | None
    timeline: tuple[Change, ...] = field(default=())

    def as_dict(self, *, timeline: bool = False) -> dict[str, Any]:
        """The object that ``virtgrid track --json`` prints."""
        out = self.view.as_dict()
        if self.end is not None:
            out |= {"state": "closed", "reason": self.end}
        if timeline:
            out["timeline"] = [
                {"at_s": round(c.at_s, 6), "verdict": c.verdict, "state": c.state, "reason": c.reason}
                for c in self.timeline
            ]
        return out


class _Keeping(Tracker):
    """A tracker that keeps what has gone, and every connection's changes when ``timeline``."""

    def __init__(self, definitions: Sequence[Definition] | None, large_bytes: int, timeline: bool) -> None:
        super().__init__(definitions, large_bytes=large_bytes)
        self.tells = timeline
        self.timelines: dict[Connection, list[Change]] = {}
        self.done: list[Replayed] = []

    def counted(self, by: int, at_s: float) -> None:
        """Nobody asks a replay how many were unsuitable when."""

    def changed(self, conn: Connection, told: Told) -> None:
        self.timelines.setdefault(conn, []).append(worded(told))

    def closed(self, conn: Connection, reason: str) -> None:
        seen = view(conn, conn.last_s, Verdict.SUITABLE)
        timeline = tuple(self.timelines.pop(conn, ()))
        self.done.append(Replayed(view=seen, end=reason, timeline=timeline))

    def result(self) -> list[Replayed]:
        self.tick(self.now_s)
        return self.done + [
            Replayed(view=view(conn, self.now_s), end=None, timeline=tuple(self.timelines.get(conn, ())))
            for conn in self.connections
        ]


def replay(
    frames: Iterable[Frame],
    definitions: Sequence[Definition] | None = None,
    *,
    large_bytes: int = LARGE_BYTES,
    timeline: bool = True,
) -> list[Replayed]:
    """Run the frames through a tracker; the connections in the order they ended, then those still open.

    A connection that is over counts as suitable: its reason says how it ended.
    """
    tracker = _Keeping(definitions, large_bytes, timeline)
    for frame in frames:
        tracker.feed(frame.data, frame.wire_len, frame.at_s)
    return tracker.result()


def replay_blocks(
    blocks: Iterable[FrameBlock],
    definitions: Sequence[Definition] | None = None,
    *,
    large_bytes: int = LARGE_BYTES,
    timeline: bool = True,
) -> list[Replayed]:
    """The same from blocks of frames, many times as fast; faster still without the timelines."""
    tracker = _Keeping(definitions, large_bytes, timeline)
    for block in blocks:
        tracker.feed_block(block)
    return tracker.result()

"""What the figure of a migration shows, before anyone draws it: pure geometry for HTML and PNG alike.

One time axis over bands: phases, what is left to copy, unsuitable connections, one lane per
connection. A short hold after a long copy would be a hair's breadth, so the axis may change its
scale once, where the switchover comes near; a second panel shows the pause and two seconds
either side. Positions are shares of a panel's width, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from virtgrid.core.units import format_duration
from virtgrid.report.model import Lane, LaneSpan, PhaseSpan
from virtgrid.report.timeline import Timeline

#: Seconds shown before the stop and after the resume in the second panel.
ZOOM_S: Final = 2.0
#: The share of the axis that the time before the switchover comes near may take when it is long.
_BEFORE_SHARE: Final = 0.36
_STEPS_S: Final = (
    0.05,
    0.1,
    0.2,
    0.5,
    1,
    2,
    5,
    10,
    20,
    30,
    60,
    120,
    300,
    600,
    1200,
    1800,
    3600,
    7200,
    21600,
    86400,
)

#: Colours from Okabe and Ito's set, told apart with any kind of colour vision, and by height as well.
#: name: (on light ground, on dark ground).
COLOURS: Final = {
    "suitable": ("#7fb8dc", "#3f7ea8"),
    "unsuitable": ("#d55e00", "#ff8533"),
    "unknown": ("#8a8a8a", "#a0a0a0"),
    "memory": ("#009e73", "#2fc79b"),
    "disk": ("#7f94a8", "#7189a3"),
    "dirty": ("#b0508a", "#e08cc0"),
    "speed": ("#0072b2", "#5fb3ea"),
    "hold": ("#fff2cc", "#3a3216"),
    "holdphase": ("#e6b422", "#c79a1a"),
    "phase": ("#dfe5ea", "#333c46"),
    "phase2": ("#cdd6de", "#3f4a56"),
    "broken": ("#e9a6a0", "#7d3530"),
    "pause": ("#1a1a1a", "#f2f2f2"),
    "ink": ("#1f2428", "#e4e7ea"),
    "faint": ("#6a737d", "#98a2ad"),
    "grid": ("#e3e7eb", "#2c333a"),
    "ground": ("#ffffff", "#15191d"),
}
VERDICTS: Final = ("suitable", "unknown", "unsuitable")
#: How much of its lane's height a verdict fills: the second sign beside colour.
HEIGHT_OF: Final = {"suitable": 0.24, "unknown": 0.5, "unsuitable": 0.86}

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """Seconds to shares of a width, by straight pieces (t0, t1, x0, x1)."""

    pieces: tuple[tuple[float, float, float, float], ...]

    @property
    def begin_s(self) -> float:
        return self.pieces[0][0]

    @property
    def end_s(self) -> float:
        return self.pieces[-1][1]

    def x(self, t: float) -> float:
        for t0, t1, x0, x1 in self.pieces:
            if t <= t1 or (t0, t1) == self.pieces[-1][:2]:
                share = (min(max(t, t0), t1) - t0) / (t1 - t0) if t1 > t0 else 0.0
                return x0 + share * (x1 - x0)
        return 1.0

    def covers(self, t0: float, t1: float) -> bool:
        return t1 >= self.begin_s and t0 <= self.end_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One view of the time axis. changes: where the scale changes, as x and what to say there."""

    title: str
    scale: Scale
    ticks: tuple[tuple[float, str], ...]
    changes: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Everything to draw. Points are (seconds, value); steps hold their value until the next."""

    timeline: Timeline
    panels: tuple[Panel, ...]
    phases: tuple[PhaseSpan, ...]
    disk: Points
    memory: Points
    dirty: Points
    speed: Points
    floor_bytes: float
    top_bytes: float
    byte_ticks: tuple[tuple[float, str], ...]
    unsuitable: Points
    allowed: Points
    top_count: int
    count_ticks: tuple[int, ...]
    lanes: tuple[Lane, ...]
    lanes_left_out: int
    hold: tuple[float, float] | None
    released_s: float | None
    pause: tuple[float, float] | None


def step_of(span_s: float, wanted: int) -> float:
    """A round distance that gives at most ``wanted`` ticks."""
    return next((step for step in _STEPS_S if span_s / step <= wanted), span_s / wanted)


def _count_step(top: int) -> int:
    """1, 2, 5, 10, 20 … so that at most four steps reach the top."""
    step = 1
    while top > 4 * step:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return step


def clock_label(t: float) -> str:
    """``14 s``, ``2:30``, ``1:04:00``."""
    sign, t = ("−" if t < 0 else ""), abs(t)
    if t < 120:
        return f"{sign}{t:g} s"
    minutes, seconds = divmod(round(t), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{sign}{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{sign}{minutes}:{seconds:02d}"


def _ticks(scale: Scale, wanted: int, zero_s: float = 0.0) -> tuple[tuple[float, str], ...]:
    out: list[tuple[float, str]] = []
    for t0, t1, x0, x1 in scale.pieces:
        step = step_of(t1 - t0, max(2, round(wanted * (x1 - x0))))
        first = int((t0 - zero_s) / step) - 1
        for k in range(first, int((t1 - zero_s) / step) + 2):
            t = zero_s + k * step
            if t0 - 1e-9 <= t <= t1 + 1e-9:
                x = scale.x(t)
                if not out or x - out[-1][0] > 0.6 / wanted:
                    sign = "+" if zero_s and k > 0 else ""
                    out.append((x, sign + clock_label(round(k * step, 3))))
    return tuple(out)


def _whole_panel(timeline: Timeline, wanted: int) -> Panel:
    end = max(timeline.end_s, 0.1)
    near: float | None = None
    if timeline.hold is not None:
        until = timeline.hold.end_s if timeline.hold.end_s is not None else end
        near = timeline.hold.start_s - max(0.5, 0.2 * (until - timeline.hold.start_s))
    elif timeline.stopped_s is not None:
        near = timeline.stopped_s - 3 * ZOOM_S
    scale = Scale(((0.0, end, 0.0, 1.0),))
    changes: tuple[tuple[float, str], ...] = ()
    if near is not None and 0 < near < end:
        factor = (1 - _BEFORE_SHARE) / (end - near) / (_BEFORE_SHARE / near)
        if factor > 1.5:
            scale = Scale(((0.0, near, 0.0, _BEFORE_SHARE), (near, end, _BEFORE_SHARE, 1.0)))
            changes = ((_BEFORE_SHARE, f"time ×{factor:.0f}" if factor >= 3 else f"time ×{factor:.1f}"),)
    return Panel(title="the whole migration", scale=scale, ticks=_ticks(scale, wanted), changes=changes)


def _pause_panel(timeline: Timeline, wanted: int) -> Panel | None:
    if timeline.stopped_s is None:
        return None
    stop = timeline.stopped_s
    run = timeline.resumed_s if timeline.resumed_s is not None else timeline.end_s
    scale = Scale(((max(0.0, stop - ZOOM_S), max(stop, run) + ZOOM_S, 0.0, 1.0),))
    return Panel(title="the pause, ± 2 s", scale=scale, ticks=_ticks(scale, wanted, zero_s=stop))


def thin(points: Sequence[tuple[float, float]], buckets: int = 1500) -> Points:
    """A few points per bucket of time: first, lowest, highest, last; no peak and no zero is lost."""
    if len(points) <= buckets * 4:
        return tuple(points)
    begin, end = points[0][0], points[-1][0]
    width = (end - begin) / buckets or 1.0
    kept: dict[int, dict[str, tuple[float, float]]] = {}
    for point in points:
        slot = kept.setdefault(int((point[0] - begin) / width), {"first": point, "low": point, "high": point})
        slot["last"] = point
        if point[1] < slot["low"][1]:
            slot["low"] = point
        if point[1] > slot["high"][1]:
            slot["high"] = point
    return tuple(point for slot in kept.values() for point in sorted(set(slot.values())))


def within(points: Points, scale: Scale, *, steps: bool) -> list[tuple[float, float]]:
    """The points of a panel; with ``steps``, the value in force at its beginning as well."""
    inside = [p for p in points if scale.begin_s <= p[0] <= scale.end_s]
    before = [p for p in points if p[0] < scale.begin_s]
    after = next((p for p in points if p[0] > scale.end_s), None)
    if before:
        if steps or not (inside or after):
            inside.insert(0, (scale.begin_s, before[-1][1]))
        elif following := (inside[0] if inside else after):
            inside.insert(0, _between(before[-1], following, scale.begin_s))
    if after and inside and not steps:
        inside.append(_between(inside[-1], after, scale.end_s))
    return inside


def _between(a: tuple[float, float], b: tuple[float, float], t: float) -> tuple[float, float]:
    share = (t - a[0]) / (b[0] - a[0]) if b[0] > a[0] else 0.0
    return t, a[1] + share * (b[1] - a[1])


def unsuitable_series(timeline: Timeline) -> list[tuple[float, float]]:
    """How many connections were not suitable, step by step.

    Every change of a verdict is recorded, so the lanes give it exactly; the counts, written now
    and then, serve where there are no lanes.
    """
    if not timeline.lanes:
        return [(sample.at_s, float(sample.unsuitable)) for sample in timeline.counts_series]
    changes: dict[float, int] = {}
    for lane in timeline.lanes:
        for span in lane.spans:
            step = 0 if span.verdict == "suitable" else 1
            changes[span.start_s] = changes.get(span.start_s, 0) + step
            if span.end_s is not None:
                changes[span.end_s] = changes.get(span.end_s, 0) - step
    series: list[tuple[float, float]] = []
    number = 0
    for at_s in sorted(changes):
        number += changes[at_s]
        series.append((at_s, float(number)))
    return series


def spread(
    steps: Sequence[tuple[float, float]], begin: float, end: float
) -> tuple[float, float, float] | None:
    """Lowest, mean over time and highest value of a step series within a window."""
    scale = Scale(((begin, max(end, begin), 0.0, 1.0),))
    inside = within(tuple(steps), scale, steps=True)
    if not inside or end <= begin:
        return None
    area = sum(
        value * (following - at_s)
        for (at_s, value), following in zip(inside, [t for t, _ in inside[1:]] + [end], strict=True)
    )
    values = [value for _, value in inside]
    return min(values), area / (end - inside[0][0]) if end > inside[0][0] else values[-1], max(values)


def _disk_points(timeline: Timeline) -> list[tuple[float, float]]:
    left: dict[str, float] = {}
    points: list[tuple[float, float]] = []
    for sample in timeline.storage_series:
        left[sample.disk] = 0.0 if sample.ready else max(0, sample.total_bytes - sample.copied_bytes)
        points.append((sample.at_s, sum(left.values())))
    return points


def _byte_ticks(top: float, floor: float) -> tuple[tuple[float, str], ...]:
    names = ((1 << 10, "KiB"), (1 << 20, "MiB"), (1 << 30, "GiB"), (1 << 40, "TiB"))
    every = [(unit * k, f"{k} {name}") for unit, name in names for k in (1, 16, 256)]
    return tuple((value, label) for value, label in every if floor <= value <= top)


def unsuitable_seconds(lane: Lane, begin: float, end: float) -> float:
    """How long a connection was not suitable within a window."""
    return sum(
        max(0.0, min(end, end if span.end_s is None else span.end_s) - max(begin, span.start_s))
        for span in lane.spans
        if span.verdict != "suitable"
    )


def span_at(lane: Lane, t: float) -> LaneSpan | None:
    """The span in force at a moment."""
    return next((s for s in lane.spans if s.start_s <= t and (s.end_s is None or s.end_s > t)), None)


def choose_lanes(timeline: Timeline, most: int) -> tuple[tuple[Lane, ...], int]:
    """The connections to show, those that made it wait longest first; and how many were left out."""
    end = timeline.end_s
    if timeline.hold is not None:
        window = timeline.hold.start_s, timeline.hold.end_s if timeline.hold.end_s is not None else end
    elif timeline.stopped_s is not None:
        window = max(0.0, timeline.stopped_s - ZOOM_S), timeline.stopped_s
    else:
        window = 0.0, end
    stop = timeline.stopped_s

    def rank(lane: Lane) -> tuple[bool, float, float]:
        held_up = span_at(lane, stop) if stop is not None else None
        at_pause = held_up is not None and held_up.verdict != "suitable"
        return (not at_pause, -unsuitable_seconds(lane, *window), -unsuitable_seconds(lane, 0.0, end))

    known = sum(1 for lane in timeline.lanes if lane.spans)
    lanes = sorted((lane for lane in timeline.lanes if lane.spans), key=rank)
    # What is still open was last known at the record's end; the axis may go on beyond it.
    lanes = [
        replace(
            lane,
            spans=tuple(
                s if s.end_s is not None else replace(s, end_s=max(end, s.start_s)) for s in lane.spans
            ),
        )
        for lane in lanes[:most]
    ]
    return tuple(lanes), max(0, known - most)


def segments(lane: Lane, scale: Scale, finest: float) -> list[tuple[str, float, float]]:
    """A lane as (verdict, x0, x1); gaps and blips finer than ``finest`` run together, none disappears."""
    out: list[tuple[str, float, float]] = []
    last: dict[str, int] = {}
    for span in lane.spans:
        until = scale.end_s if span.end_s is None else span.end_s
        if not scale.covers(span.start_s, until) or until < scale.begin_s:
            continue
        x0, x1 = scale.x(span.start_s), max(scale.x(until), scale.x(span.start_s) + finest)
        verdict = span.verdict if span.verdict in HEIGHT_OF else "unknown"
        at = last.get(verdict)
        if at is not None and x0 - out[at][2] < finest:
            out[at] = (verdict, out[at][1], max(x1, out[at][2]))
        else:
            last[verdict] = len(out)
            out.append((verdict, x0, min(1.0, x1)))
    return out


def build(timeline: Timeline, *, most_lanes: int = 60, wanted_ticks: int = 10) -> Figure:
    """The figure of a migration, finished or not."""
    zoom = _pause_panel(timeline, max(4, wanted_ticks // 2))
    whole = _whole_panel(timeline, wanted_ticks)
    memory = [(s.at_s, float(s.remaining_bytes)) for s in timeline.ram_series]
    dirty = [(s.at_s, s.dirty_bytes_s) for s in timeline.ram_series if s.dirty_bytes_s is not None]
    speed = [(s.at_s, s.speed_bytes_s) for s in timeline.ram_series if s.speed_bytes_s is not None]
    disk = _disk_points(timeline)
    top = max([value for series in (memory, disk, dirty, speed) for _, value in series] or [1 << 20]) * 1.6
    lowest = min([value for _, value in memory if value > 0] or [1 << 20])
    floor = max(4096.0, min(lowest / 2, 256 << 10))
    unsuitable = unsuitable_series(timeline)
    top_count = max([int(n) for _, n in unsuitable] or [1]) or 1
    count_step = _count_step(top_count)
    lanes, left_out = choose_lanes(timeline, most_lanes)
    hold = timeline.hold
    pause = None
    if timeline.stopped_s is not None:
        run = timeline.resumed_s if timeline.resumed_s is not None else timeline.end_s
        pause = timeline.stopped_s, run
    return Figure(
        timeline=timeline,
        panels=(whole,) if zoom is None else (whole, zoom),
        phases=timeline.phases,
        disk=thin(disk),
        memory=thin(memory),
        dirty=thin(dirty),
        speed=thin(speed),
        floor_bytes=floor,
        top_bytes=max(top, floor * 16),
        byte_ticks=_byte_ticks(top, floor),
        unsuitable=thin(unsuitable),
        allowed=tuple((d.at_s, float(d.allowed)) for d in timeline.decisions if d.allowed is not None),
        top_count=top_count,
        count_ticks=tuple(range(0, top_count + 1, count_step)),
        lanes=lanes,
        lanes_left_out=left_out,
        hold=None if hold is None else (hold.start_s, timeline.end_s if hold.end_s is None else hold.end_s),
        released_s=timeline.released.at_s if timeline.released else None,
        pause=pause,
    )


def hold_label(figure: Figure) -> str:
    """``held 6.0 s``."""
    held = figure.timeline.held_s
    return f"held {format_duration(held)}" if held is not None else "held"


def pause_label(figure: Figure) -> str:
    """``guest stopped 158 ms``."""
    downtime = figure.timeline.downtime_s
    return f"guest stopped {format_duration(downtime)}" if downtime is not None else "guest stopped"

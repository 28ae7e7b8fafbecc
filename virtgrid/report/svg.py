"""The figure as inline SVG: colours by CSS class, so that one drawing serves light, dark and print."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from virtgrid.core.units import format_duration
from virtgrid.report.figure import (
    HEIGHT_OF,
    VERDICTS,
    Figure,
    Panel,
    Scale,
    hold_label,
    pause_label,
    segments,
    unsuitable_seconds,
    within,
)
from virtgrid.report.model import Lane

WIDTH: Final = 1180
_LEFT: Final = 128
_RIGHT: Final = 12
_BETWEEN: Final = 34
_ZOOM_SHARE: Final = 0.36
_HEAD: Final = 40
_PHASES: Final = 26
_BYTES: Final = 150
_COUNTS: Final = 96
_LANE: Final = 9.5
_GAP: Final = 30


@dataclass(frozen=True, slots=True)
class _Box:
    """Where a panel's band lies, in the drawing's units."""

    scale: Scale
    left: float
    width: float
    top: float
    height: float

    def x(self, t: float) -> float:
        return self.left + self.width * self.scale.x(t)


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: object) -> ET.Element:
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    shown = {
        name: f"{v:.2f}".rstrip("0").rstrip(".") if isinstance(v, float) else str(v)
        for name, v in names.items()
    }
    node = ET.SubElement(parent, tag, shown)
    node.text = text
    return node


def _path(points: Iterator[tuple[float, float]] | list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _stepped(points: list[tuple[float, float]], end_s: float) -> list[tuple[float, float]]:
    out: list[tuple[float, float]] = []
    for (t, value), following in itertools.zip_longest(points, points[1:]):
        out += [(t, value), (following[0] if following else end_s, value)]
    return out


def draw(figure: Figure, *, label: str = "Timeline of the migration") -> str:
    """The figure as an ``<svg>`` element in text; every text in it is escaped."""
    lanes_height = max(1.0, len(figure.lanes)) * _LANE
    tops = {"phases": float(_HEAD)}
    tops["bytes"] = tops["phases"] + _PHASES + _GAP
    tops["counts"] = tops["bytes"] + _BYTES + _GAP
    counts_height = _COUNTS if figure.unsuitable else 0
    tops["lanes"] = tops["counts"] + counts_height + (_GAP if figure.lanes else 0)
    bottom = tops["lanes"] + (lanes_height if figure.lanes else 0)
    height = bottom + 34
    root = ET.Element(
        "svg",
        {"viewBox": f"0 0 {WIDTH} {height:.0f}", "class": "figure", "role": "img", "aria-label": label},
    )
    usable = WIDTH - _LEFT - _RIGHT
    widths = [float(usable)]
    if len(figure.panels) == 2:
        zoom = usable * _ZOOM_SHARE - _BETWEEN
        widths = [usable - zoom - _BETWEEN, zoom]
    left = float(_LEFT)
    for number, (panel, width) in enumerate(zip(figure.panels, widths, strict=True)):

        def box(
            band: str, size: float, left: float = left, width: float = width, panel: Panel = panel
        ) -> _Box:
            return _Box(panel.scale, left, width, tops[band], size)

        everything = _Box(panel.scale, left, width, float(_HEAD), bottom - _HEAD)
        _add(root, "text", panel.title, x=left, y=13.0, class_="ptitle")
        _ground(root, everything, figure, panel)
        _phases(root, box("phases", _PHASES), figure)
        _bytes(root, box("bytes", _BYTES), figure, axis=number == 0)
        if figure.unsuitable:
            _counts(root, box("counts", _COUNTS), figure, axis=number == 0)
        _lanes(root, box("lanes", lanes_height), figure, names=number == 0)
        _marks(root, everything, figure, zoomed=number == 1)
        left += width + _BETWEEN
    _titles(root, tops, figure)
    return ET.tostring(root, encoding="unicode")


def _titles(root: ET.Element, tops: dict[str, float], figure: Figure) -> None:
    x = float(_LEFT)
    title = _add(root, "text", x=x, y=tops["bytes"] - 8, class_="band")
    _add(title, "tspan", "left to copy: ")
    for name, text in (
        ("disk", "disk"),
        ("memory", "memory"),
        ("dirty", "memory dirtied per second"),
        ("speed", "memory sent per second"),
    ):
        if getattr(figure, name):
            _add(
                title,
                "tspan",
                ("■ " if name in {"disk", "memory"} else "━ ") + text + "   ",
                class_=f"t-{name}",
            )
    text = "connections not suitable for a stop" if figure.unsuitable else "connections: nobody counted them"
    title = _add(root, "text", x=x, y=tops["counts"] - 8, class_="band")
    _add(title, "tspan", text + "   ")
    if figure.allowed:
        _add(title, "tspan", "┅ allowed by the policy", class_="t-allowed")
    if not figure.lanes:
        return
    title = _add(root, "text", x=x, y=tops["lanes"] - 8, class_="band")
    _add(title, "tspan", "one lane per connection: ")
    for verdict in reversed(VERDICTS):
        _add(title, "tspan", f"■ {verdict}   ", class_=f"t-{verdict}")
    if figure.lanes_left_out:
        total = len(figure.lanes) + figure.lanes_left_out
        text = f"({len(figure.lanes)} of {total}, those that delayed it most)"
        _add(title, "tspan", text, class_="faint")


def _ground(root: ET.Element, box: _Box, figure: Figure, panel: Panel) -> None:
    """Behind everything: the hold's interval, the grid and the time axis."""
    bottom = box.top + box.height
    if figure.hold and panel.scale.covers(*figure.hold):
        x0, x1 = box.x(figure.hold[0]), box.x(figure.hold[1])
        _add(root, "rect", x=x0, y=box.top, width=max(0.5, x1 - x0), height=box.height, class_="hold")
    for share, text in panel.ticks:
        x = box.left + share * box.width
        _add(root, "line", x1=x, x2=x, y1=box.top, y2=bottom, class_="grid")
        anchor = "start" if share < 0.02 else "end" if share > 0.98 else "middle"
        _add(root, "text", text, x=x, y=bottom + 15, class_="tick", text_anchor=anchor)
    for share, text in panel.changes:
        x = box.left + share * box.width
        _add(root, "line", x1=x, x2=x, y1=box.top - 6, y2=bottom + 4, class_="change")
        _add(root, "text", f"{text} →", x=x + 4, y=bottom + 29, class_="tick")


def _phases(root: ET.Element, box: _Box, figure: Figure) -> None:
    for number, span in enumerate(figure.phases):
        end = figure.timeline.end_s if span.end_s is None else span.end_s
        if not box.scale.covers(span.start_s, end):
            continue
        x0, x1 = box.x(span.start_s), box.x(end)
        kind = "holdphase" if span.name == "hold" else "broken" if span.broken else f"phase{number % 2}"
        node = _add(
            root, "rect", x=x0, y=box.top, width=max(0.6, x1 - x0), height=box.height, class_=f"ph {kind}"
        )
        _add(node, "title", f"{span.name}: {format_duration(end - span.start_s)}")
        if x1 - x0 > 6.6 * len(span.name) + 4:
            _add(
                root,
                "text",
                span.name,
                x=(x0 + x1) / 2,
                y=box.top + 17,
                class_=f"pname {kind}",
                text_anchor="middle",
            )


def _bytes(root: ET.Element, box: _Box, figure: Figure, *, axis: bool) -> None:
    low, high = math.log(figure.floor_bytes), math.log(figure.top_bytes)

    def y(value: float) -> float:
        share = (math.log(max(value, figure.floor_bytes)) - low) / (high - low)
        return box.top + box.height * (1 - share)

    bottom = box.top + box.height
    for value, text in figure.byte_ticks:
        _add(root, "line", x1=box.left, x2=box.left + box.width, y1=y(value), y2=y(value), class_="grid")
        if axis:
            _add(root, "text", text, x=box.left - 6, y=y(value) + 3.5, class_="tick", text_anchor="end")
    for name in ("disk", "memory"):
        points = within(getattr(figure, name), box.scale, steps=False)
        if len(points) > 1:
            line = [(box.x(t), y(v)) for t, v in points]
            area = [(line[0][0], bottom), *line, (line[-1][0], bottom)]
            _add(root, "path", d=_path(area) + "Z", class_=f"a-{name}")
            _add(root, "path", d=_path(line), class_=f"l-{name}")
    for name in ("dirty", "speed"):
        points = within(getattr(figure, name), box.scale, steps=False)
        if len(points) > 1:
            _add(root, "path", d=_path([(box.x(t), y(v)) for t, v in points]), class_=f"l-{name}")
    _add(root, "line", x1=box.left, x2=box.left + box.width, y1=bottom, y2=bottom, class_="axis")


def _counts(root: ET.Element, box: _Box, figure: Figure, *, axis: bool) -> None:
    top = figure.top_count * 1.08

    def y(value: float) -> float:
        return box.top + box.height * (1 - min(value, top) / top)

    for value in figure.count_ticks:
        _add(root, "line", x1=box.left, x2=box.left + box.width, y1=y(value), y2=y(value), class_="grid")
        if axis:
            _add(root, "text", f"{value}", x=box.left - 6, y=y(value) + 3.5, class_="tick", text_anchor="end")
    until = min(box.scale.end_s, figure.timeline.end_s)
    points = _stepped(within(figure.unsuitable, box.scale, steps=True), until)
    if points:
        line = [(box.x(t), y(v)) for t, v in points]
        area = [(line[0][0], y(0)), *line, (line[-1][0], y(0))]
        _add(root, "path", d=_path(area) + "Z", class_="a-unsuitable")
        _add(root, "path", d=_path(line), class_="l-unsuitable")
    hold_end = figure.hold[1] if figure.hold else until
    allowed = _stepped(within(figure.allowed, box.scale, steps=True), min(until, hold_end))
    if len(allowed) > 1 and allowed[0][0] < hold_end:
        _add(root, "path", d=_path([(box.x(t), y(v)) for t, v in allowed]), class_="l-allowed")
    _add(root, "line", x1=box.left, x2=box.left + box.width, y1=y(0), y2=y(0), class_="axis")


def _lane_title(figure: Figure, lane: Lane) -> str:
    begin, end = figure.hold or (0.0, figure.timeline.end_s)
    waited = format_duration(unsuitable_seconds(lane, begin, end))
    where = "in the hold" if figure.hold else "in all"
    return f"{lane.protocol} {lane.client} → {lane.server}: not suitable for {waited} {where}"


def _lanes(root: ET.Element, box: _Box, figure: Figure, *, names: bool) -> None:
    finest = 0.7 / box.width
    for number, lane in enumerate(figure.lanes):
        top = box.top + number * _LANE
        if names:
            _add(root, "text", lane.client, x=box.left - 6, y=top + 7.6, class_="lane", text_anchor="end")
        group = _add(root, "g")
        _add(group, "title", _lane_title(figure, lane))
        strokes: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
        for verdict, x0, x1 in segments(lane, box.scale, finest):
            size = _LANE * HEIGHT_OF[verdict]
            y0 = top + (_LANE - size) / 2
            left, width = box.left + x0 * box.width, (x1 - x0) * box.width
            strokes[verdict].append(f"M{left:.1f} {y0:.1f}h{width:.1f}v{size:.1f}h{-width:.1f}z")
        for verdict, parts in strokes.items():
            if parts:
                _add(group, "path", d="".join(parts), class_=f"v-{verdict}")


def _marks(root: ET.Element, box: _Box, figure: Figure, *, zoomed: bool) -> None:
    """Over everything: when it was released, when the guest stood still."""
    bottom = box.top + box.height
    label_y = box.top - 8

    def line(t: float, kind: str) -> None:
        _add(root, "line", x1=box.x(t), x2=box.x(t), y1=box.top - 5, y2=bottom, class_=kind)

    if figure.hold and not zoomed:
        x0, x1 = box.x(figure.hold[0]), box.x(figure.hold[1])
        _add(
            root, "text", hold_label(figure), x=(x0 + x1) / 2, y=label_y, class_="mark", text_anchor="middle"
        )
    if figure.released_s is not None and zoomed:
        line(figure.released_s, "m-released")
    if figure.pause is None:
        return
    stop, run = figure.pause
    x0, x1 = box.x(stop), box.x(run)
    _add(root, "rect", x=x0, y=box.top - 5, width=max(1.0, x1 - x0), height=box.height + 5, class_="pause")
    line(stop, "m-stop")
    if figure.timeline.resumed_s is not None:
        line(run, "m-run")
    if zoomed:
        released = "released ·" if figure.released_s is not None else ""
        _add(root, "text", f"{released} stopped", x=x0 + 1, y=label_y, class_="mark", text_anchor="end")
        _add(root, "text", f"runs after {format_duration(run - stop)}", x=x1 + 1, y=label_y, class_="mark")
    elif figure.hold is None or box.x(figure.hold[1]) - box.x(figure.hold[0]) > 60:
        near_end = x0 > box.left + box.width - 130
        anchor, x = ("end", box.left + box.width) if near_end else ("start", x0)
        _add(root, "text", pause_label(figure), x=x, y=label_y, class_="mark", text_anchor=anchor)

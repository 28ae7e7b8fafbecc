"""The same figure as PNG, drawn by matplotlib without a screen: for mail, tickets and papers."""

from __future__ import annotations

import io
import warnings
from typing import Any, Final

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.patches import Rectangle

from virtgrid.core.units import format_duration
from virtgrid.report.figure import (
    COLOURS,
    HEIGHT_OF,
    VERDICTS,
    Figure,
    Panel,
    Points,
    build,
    hold_label,
    pause_label,
    segments,
    within,
)
from virtgrid.report.timeline import Timeline
from virtgrid.report.words import verdict

WIDTH_PX: Final = 1600
HEIGHT_PX: Final = 1000
_DPI: Final = 100
_MOST_LANES: Final = 38
_LIGHT: Final = {name: pair[0] for name, pair in COLOURS.items()}
_FONT: Final = "DejaVu Sans"


def render_png(timeline: Timeline) -> bytes:
    """The figure of a migration, 1600 × 1000 pixels."""
    figure = build(timeline, most_lanes=_MOST_LANES)
    canvas = Canvas(figsize=(WIDTH_PX / _DPI, HEIGHT_PX / _DPI), dpi=_DPI, facecolor=_LIGHT["ground"])
    FigureCanvasAgg(canvas)
    _header(canvas, timeline)
    two = len(figure.panels) == 2
    grid = canvas.add_gridspec(
        4, len(figure.panels), width_ratios=(1.9, 1.0) if two else (1.0,),
        height_ratios=_heights(figure),
        left=0.085, right=0.988, top=0.775, bottom=0.05, hspace=0.13, wspace=0.055,
    )  # fmt: skip
    for column, panel in enumerate(figure.panels):
        rows = [canvas.add_subplot(grid[row, column]) for row in range(4)]
        for axes in rows:
            _prepare(axes, panel, figure)
        first = column == 0
        _phases(rows[0], panel, figure)
        _bytes(rows[1], panel, figure, first)
        _counts(rows[2], panel, figure, first)
        _lanes(rows[3], panel, figure, first)
        _marks(rows, panel, figure, zoomed=not first)
        rows[3].set_xticks([x for x, _ in panel.ticks], [label for _, label in panel.ticks])
        rows[3].tick_params(axis="x", labelbottom=True, labelsize=9, colors=_LIGHT["faint"], length=0)
        for x, label in panel.changes:
            rows[3].text(x + 0.004, -0.075, f"{label} →", transform=rows[3].transAxes, fontsize=8,
                         color=_LIGHT["faint"], va="top", family=_FONT)  # fmt: skip
    out = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script DejaVu lacks is drawn as boxes; that is no news for standard error.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from")
        canvas.savefig(
            out, format="png", dpi=_DPI, facecolor=_LIGHT["ground"], metadata={"Software": "virtgrid"}
        )
    return out.getvalue()


def _heights(figure: Figure) -> tuple[float, float, float, float]:
    """Shares of the bands; what has nothing to show leaves its room to the curves above it."""
    counts = 0.17 if figure.unsuitable else 0.002
    lanes = 0.525 if figure.lanes else 0.002
    return 0.055, 0.945 - counts - lanes, counts, lanes


def _text(value: str) -> str:
    """Text that matplotlib must not take for mathematics."""
    return value.replace("$", r"\$")


def _header(canvas: Canvas, t: Timeline) -> None:
    title = f"{t.domain}: {t.source} → {t.destination}"
    ink: dict[str, Any] = {"family": _FONT, "color": _LIGHT["ink"], "va": "top"}
    faint = {**ink, "color": _LIGHT["faint"]}
    canvas.text(0.012, 0.975, _text(title), fontsize=19, weight="bold", **ink)
    subtitle = f"{t.id} · policy {t.policy or 'none'}"
    canvas.text(0.988, 0.969, _text(subtitle), fontsize=10.5, ha="right", **faint)
    sentence = verdict(t)
    shown = sentence if len(sentence) <= 165 else sentence[:164] + "…"
    canvas.text(0.012, 0.933, _text(shown), fontsize=12.5, **ink)
    numbers = (
        ("total", _duration(t.total_s)),
        ("held", _duration(t.held_s if t.hold else None)),
        ("guest stopped", _duration(t.downtime_s)),
        ("guest answers", {"yes": "yes", "no": "NO", "unknown": "not known"}.get(t.answering or "", "–")),
    )
    for number, (label, value) in enumerate(numbers):
        x = 0.085 + 0.135 * number
        canvas.text(x, 0.898, label, fontsize=9.5, **faint)
        canvas.text(x, 0.881, value, fontsize=16, weight="bold", **ink)


def _duration(seconds: float | None) -> str:
    return "–" if seconds is None else format_duration(seconds)


def _prepare(axes: Any, panel: Panel, figure: Figure) -> None:
    axes.set_xlim(0, 1)
    axes.set_facecolor(_LIGHT["ground"])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LIGHT["faint"])
    axes.tick_params(labelbottom=False, labelleft=False, length=0)
    axes.set_xticks([x for x, _ in panel.ticks])
    axes.grid(axis="x", color=_LIGHT["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    if figure.hold and panel.scale.covers(*figure.hold):
        axes.axvspan(
            panel.scale.x(figure.hold[0]), panel.scale.x(figure.hold[1]), color=_LIGHT["hold"], lw=0, zorder=0
        )
    for x, _ in panel.changes:
        axes.axvline(x, color=_LIGHT["faint"], linewidth=0.9, linestyle=(0, (5, 4)), zorder=1)


def _phases(axes: Any, panel: Panel, figure: Figure) -> None:
    axes.set_ylim(0, 1)
    axes.spines["bottom"].set_visible(False)
    pixels = axes.get_position().width * WIDTH_PX
    for number, span in enumerate(figure.phases):
        end = figure.timeline.end_s if span.end_s is None else span.end_s
        if not panel.scale.covers(span.start_s, end):
            continue
        x0, x1 = panel.scale.x(span.start_s), panel.scale.x(end)
        kind = (
            "broken"
            if span.broken
            else "holdphase"
            if span.name == "hold"
            else ("phase", "phase2")[number % 2]
        )
        axes.add_patch(
            Rectangle(
                (x0, 0), max(x1 - x0, 0.0005), 1, facecolor=_LIGHT[kind], edgecolor=_LIGHT["ground"], zorder=2
            )
        )
        if (x1 - x0) * pixels > 8.5 * len(span.name) + 6:
            weight = "bold" if span.name == "hold" else "normal"
            axes.text((x0 + x1) / 2, 0.46, _text(span.name), ha="center", va="center", fontsize=10, zorder=3,
                      weight=weight, family=_FONT, color=_LIGHT["ink"])  # fmt: skip


def _series(panel: Panel, points: Points) -> tuple[list[float], list[float]]:
    chosen = within(points, panel.scale, steps=False)
    return [panel.scale.x(t) for t, _ in chosen], [value for _, value in chosen]


def _steps(panel: Panel, points: Points, until_s: float) -> tuple[list[float], list[float]]:
    inside = [(t, v) for t, v in within(points, panel.scale, steps=True) if t <= until_s]
    if inside:
        inside.append((min(panel.scale.end_s, until_s), inside[-1][1]))
    return [panel.scale.x(t) for t, _ in inside], [v for _, v in inside]


def _band_title(axes: Any, parts: list[tuple[str, str]]) -> None:
    """A title in several colours, set from the left."""
    areas: list[Artist] = [
        TextArea(_text(text), textprops={"color": _LIGHT[colour], "size": 9.5, "family": _FONT})
        for text, colour in parts
    ]
    box = AnchoredOffsetbox(
        loc="lower left",
        child=HPacker(children=areas, pad=0, sep=9),
        pad=0,
        borderpad=0.1,
        frameon=False,
        bbox_to_anchor=(0, 1.0),
        bbox_transform=axes.transAxes,
    )
    axes.add_artist(box)


def _bytes(axes: Any, panel: Panel, figure: Figure, first: bool) -> None:
    axes.set_yscale("log")
    axes.set_ylim(figure.floor_bytes, figure.top_bytes)
    axes.minorticks_off()
    axes.set_yticks([value for value, _ in figure.byte_ticks], [label for _, label in figure.byte_ticks])
    axes.tick_params(labelleft=first, labelsize=8.5, colors=_LIGHT["faint"], length=0)
    axes.grid(axis="y", color=_LIGHT["grid"], linewidth=0.8)
    titles = [("left to copy:", "ink")]
    for name, text in (("disk", "■ disk"), ("memory", "■ memory")):
        points = getattr(figure, name)
        if points:
            titles.append((text, name))
        xs, ys = _series(panel, points)
        if xs:
            ys = [max(y, figure.floor_bytes) for y in ys]
            axes.fill_between(xs, figure.floor_bytes, ys, color=_LIGHT[name], alpha=0.28, linewidth=0)
            axes.plot(xs, ys, color=_LIGHT[name], linewidth=1.6)
    for name, text, dashes in (
        ("dirty", "╌ dirtied per second", (0, (4, 2.5))),
        ("speed", "━ sent per second", "-"),
    ):
        points = getattr(figure, name)
        if points:
            titles.append((text, name))
        xs, ys = _series(panel, points)
        axes.plot(
            xs, [max(y, figure.floor_bytes) for y in ys], color=_LIGHT[name], linewidth=1.4, linestyle=dashes
        )
    if first:
        _band_title(axes, titles)


def _counts(axes: Any, panel: Panel, figure: Figure, first: bool) -> None:
    if not figure.unsuitable:
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
        if first:
            _band_title(axes, [("connections: nobody counted them", "faint")])
        return
    axes.set_ylim(0, figure.top_count * 1.08)
    axes.set_yticks(figure.count_ticks)
    axes.tick_params(labelleft=first, labelsize=8.5, colors=_LIGHT["faint"], length=0)
    axes.grid(axis="y", color=_LIGHT["grid"], linewidth=0.8)
    xs, ys = _steps(panel, figure.unsuitable, figure.timeline.end_s)
    if xs:
        axes.fill_between(xs, 0, ys, step="post", color=_LIGHT["unsuitable"], alpha=0.28, linewidth=0)
        axes.step(xs, ys, where="post", color=_LIGHT["unsuitable"], linewidth=1.5)
    titles = [
        (
            "connections not suitable for a stop"
            if figure.unsuitable
            else "connections: nobody counted them",
            "ink",
        )
    ]
    if figure.allowed:
        titles.append(("┅ allowed by the policy", "faint"))
        until = figure.hold[1] if figure.hold else figure.timeline.end_s
        if until > panel.scale.begin_s:
            xs, ys = _steps(panel, figure.allowed, until)
            axes.step(
                xs,
                ys,
                where="post",
                color=_LIGHT["ink"],
                linewidth=1.6,
                linestyle=(0, (1.5, 2)),
                clip_on=False,
            )
    if first:
        _band_title(axes, titles)


def _lanes(axes: Any, panel: Panel, figure: Figure, first: bool) -> None:
    axes.set_ylim(max(1, len(figure.lanes)), 0)
    axes.spines["bottom"].set_visible(bool(figure.lanes))
    axes.grid(axis="y", visible=False)
    axes.set_yticks(
        [n + 0.5 for n in range(len(figure.lanes))], [_text(lane.client) for lane in figure.lanes]
    )
    axes.tick_params(axis="y", labelleft=first, labelsize=7.2, labelfontfamily="DejaVu Sans Mono",
                     colors=_LIGHT["faint"], length=0, pad=3)  # fmt: skip
    finest = 1.0 / (axes.get_position().width * WIDTH_PX)
    for number, lane in enumerate(figure.lanes):
        bars: dict[str, list[tuple[float, float]]] = {name: [] for name in VERDICTS}
        for name, x0, x1 in segments(lane, panel.scale, finest):
            bars[name].append((x0, x1 - x0))
        for name, spans in bars.items():
            if spans:
                size = HEIGHT_OF[name]
                axes.broken_barh(
                    spans, (number + (1 - size) / 2, size), facecolors=_LIGHT[name], linewidth=0, zorder=2
                )
    if not first or not figure.lanes:
        return
    titles = [("one lane per connection:", "ink"), *((f"■ {name}", name) for name in reversed(VERDICTS))]
    if figure.lanes_left_out:
        total = len(figure.lanes) + figure.lanes_left_out
        titles.append((f"({len(figure.lanes)} of {total}, those that delayed it most)", "faint"))
    _band_title(axes, titles)


def _marks(rows: list[Any], panel: Panel, figure: Figure, *, zoomed: bool) -> None:
    x = panel.scale.x
    top = rows[0]

    def say(at: float, text: str, align: str) -> None:
        top.text(
            at,
            1.28,
            text,
            ha=align,
            va="bottom",
            fontsize=10,
            weight="bold",
            family=_FONT,
            color=_LIGHT["ink"],
        )

    top.text(
        0,
        2.15,
        panel.title,
        ha="left",
        va="bottom",
        fontsize=10.5,
        weight="bold",
        family=_FONT,
        color=_LIGHT["ink"],
    )
    if figure.hold and not zoomed:
        say((x(figure.hold[0]) + x(figure.hold[1])) / 2, hold_label(figure), "center")
    if figure.pause is None:
        return
    stop, run = figure.pause
    for axes in rows:
        axes.axvspan(x(stop), max(x(run), x(stop) + 0.001), color=_LIGHT["pause"], alpha=0.2, lw=0, zorder=4)
        axes.axvline(x(stop), color=_LIGHT["pause"], linewidth=1.6, zorder=5)
        if figure.timeline.resumed_s is not None:
            axes.axvline(x(run), color=_LIGHT["pause"], linewidth=1.6, linestyle=(0, (5, 3)), zorder=5)
        if figure.released_s is not None and zoomed:
            axes.axvline(x(figure.released_s), color=_LIGHT["pause"], linewidth=1.1, linestyle=":", zorder=5)
    if zoomed:
        say(x(stop), "released · stopped" if figure.released_s is not None else "stopped", "right")
        say(x(run), f"runs after {format_duration(run - stop)}", "left")
    elif figure.hold is None or x(figure.hold[1]) - x(figure.hold[0]) > 0.12:
        say(1.0 if x(stop) > 0.75 else x(stop), pause_label(figure), "right" if x(stop) > 0.75 else "left")

"""The report of a migration as one static HTML file: no network, no script, light and dark, printable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from virtgrid.core.units import format_duration, format_rate, format_size
from virtgrid.report.figure import (
    COLOURS,
    build,
    clock_label,
    span_at,
    spread,
    unsuitable_seconds,
    unsuitable_series,
)
from virtgrid.report.model import GateDecision, Outcome, clean
from virtgrid.report.svg import draw
from virtgrid.report.timeline import Timeline
from virtgrid.report.words import connections_of, count, short_duration, verdict

#: Decisions shown: the first and the last of a long wait tell the story.
_MOST_DECISIONS: Final = 60
_MOST_WAITED: Final = 10
_MOST_AT_PAUSE: Final = 40


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("virtgrid.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = _at
    environment.filters["duration"] = format_duration
    environment.globals["colours"] = COLOURS
    try:
        environment.globals["version"] = version("virtgrid")
    except PackageNotFoundError:
        environment.globals["version"] = ""
    return environment


def _at(t: float) -> str:
    """A moment on the report's axis: ``26.73 s``, ``12:04``."""
    return f"{t:.2f} s" if t < 120 else clock_label(t)


def _none_or(value: float | None) -> str:
    return "–" if value is None else format_duration(value)


def _figure(name: str, value: float) -> str:
    """A number by the unit in its name."""
    if name.endswith("_bytes_s"):
        return format_rate(value)
    return format_size(value) if name.endswith("_bytes") else format_duration(value)


def _cards(timeline: Timeline) -> list[dict[str, str]]:
    """The four numbers, each with what it means."""
    answering = {"yes": "yes", "no": "NO", "unknown": "not known"}.get(timeline.answering or "", "–")
    checked = timeline.verified
    kind = (
        f"{timeline.hold_kind} hold" if timeline.hold_kind else "no hold" if timeline.hold is None else "hold"
    )
    if timeline.hold and timeline.hold.max_s is not None:
        kind += f", at most {short_duration(timeline.hold.max_s)}"
    if timeline.unsuitable_at_pause is not None:
        at_pause = f"really stopped to really running; {timeline.unsuitable_at_pause} unsuitable then"
    else:
        at_pause = "really stopped to really running"
    sent = (
        f"{format_size(timeline.sent_bytes)} sent" if timeline.sent_bytes is not None else "from call to end"
    )
    after = f", {format_duration(checked.after_s)} after" if checked and checked.after_s is not None else ""
    return [
        {"label": "total", "value": _none_or(timeline.total_s), "note": sent},
        {"label": "held", "value": _none_or(timeline.held_s) if timeline.hold else "–", "note": kind},
        {"label": "guest stopped", "value": _none_or(timeline.downtime_s), "note": at_pause},
        {"label": "guest answers", "value": answering, "note": f"{checked.how}{after}" if checked else ""},
    ]


def _why(timeline: Timeline) -> list[str]:
    """The lines under the verdict: why it waited, why it was released, what went wrong."""
    lines: list[str] = []
    if timeline.hold:
        hold_end = timeline.hold.end_s if timeline.hold.end_s is not None else timeline.end_s
        if seen := spread(unsuitable_series(timeline), timeline.hold.start_s, hold_end):
            low, mean, high = seen
            lines.append(
                "While it was held, every connection was suitable for a stop."
                if not high
                else f"While it was held, {low:.0f} to {high:.0f} connections were not suitable for a stop, "
                f"{mean:.1f} on average."
            )
    if timeline.hold and timeline.hold.lost:
        lines.append("The hold was lost: QEMU completed although it was held.")
    if timeline.released:
        lines.append(f"Released by {timeline.released.by}: {timeline.released.reason}.")
    if timeline.name and timeline.name.text:
        lines.append(f"{timeline.name.text}.")
    end = timeline.end
    if end is not None:
        lines += [f"Cause: {end.cause}"] if end.cause else []
        lines += [f"Hint: {end.hint}"] if end.hint else []
    if timeline.outcome is Outcome.RUNNING and (told := connections_of(timeline)):
        lines.append(told)
    return lines


def _waited(timeline: Timeline) -> list[dict[str, str]]:
    """The connections that were unsuitable longest while it was held, and their last reason."""
    if timeline.hold is None:
        return []
    begin = timeline.hold.start_s
    end = timeline.hold.end_s if timeline.hold.end_s is not None else timeline.end_s
    ranked = sorted(
        ((unsuitable_seconds(lane, begin, end), lane) for lane in timeline.lanes),
        key=lambda pair: -pair[0],
    )
    rows = []
    for seconds, lane in ranked[:_MOST_WAITED]:
        spans = [s for s in lane.spans if s.start_s <= end and s.verdict != "suitable"]
        if seconds > 0 and spans:
            rows.append(
                {
                    "client": lane.client,
                    "protocol": lane.protocol,
                    "seconds": format_duration(seconds),
                    "reason": spans[-1].reason or spans[-1].verdict,
                }
            )
    return rows


def _at_pause(timeline: Timeline) -> list[dict[str, str]]:
    """The connections that the pause hit."""
    stop = timeline.stopped_s
    if stop is None:
        return []
    hit = [(lane, span) for lane in timeline.lanes if (span := span_at(lane, stop)) is not None]
    return [
        {
            "client": lane.client,
            "protocol": lane.protocol,
            "verdict": span.verdict,
            "since": format_duration(stop - span.start_s),
            "reason": span.reason,
        }
        for lane, span in sorted(hit, key=lambda pair: pair[1].start_s)
        if span.verdict != "suitable"
    ][:_MOST_AT_PAUSE]


def _decision(decision: GateDecision) -> dict[str, str]:
    kind = decision.decision if decision.decision in {"hold", "release", "escalate", "abort"} else ""
    return {
        "at": _at(decision.at_s),
        "kind": kind,
        "decision": decision.decision,
        "unsuitable": "" if decision.unsuitable is None else str(decision.unsuitable),
        "allowed": "" if decision.allowed is None else str(decision.allowed),
        "reason": decision.reason,
        "waiting_for": decision.waiting_for,
    }


def _tone(timeline: Timeline) -> str:
    if timeline.outcome is Outcome.RUNNING:
        return "open"
    return "" if timeline.outcome is Outcome.FINISHED and timeline.answering != "no" else "bad"


def _svg(timeline: Timeline, most_lanes: int = 60) -> Markup:
    # draw() builds the tree with ElementTree, which escapes every text and attribute.
    return Markup(draw(build(timeline, most_lanes=most_lanes), label=verdict(timeline)))  # noqa: S704


def render_html(timeline: Timeline) -> str:
    """The report of one migration, finished or not."""
    decisions = list(timeline.decisions)
    left_out = max(0, len(decisions) - _MOST_DECISIONS)
    if left_out:
        decisions = decisions[: _MOST_DECISIONS // 2] + decisions[-_MOST_DECISIONS // 2 :]
    options = [
        *timeline.options.items(),
        *((f"estimate {k}", _figure(k, v)) for k, v in timeline.estimate.items()),
    ]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            t=timeline,
            started=f"{timeline.started_at:%Y-%m-%d %H:%M:%S} UTC" if timeline.started_at else "",
            verdict=verdict(timeline),
            more=_why(timeline),
            tone=_tone(timeline),
            cards=_cards(timeline),
            svg=_svg(timeline),
            waited=_waited(timeline),
            at_pause=_at_pause(timeline),
            decisions=[_decision(d) for d in decisions],
            decisions_left_out=left_out,
            options=options,
        )
    )


Value = float | int | str | None


def _shown(value: Value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else clean(value)


def comparison_rows(plain: Timeline, gated: Timeline) -> list[tuple[str, Value, Value, str]]:
    """The figures every comparison begins with."""

    def pair(name: str, unit: str, get: str, factor: float = 1.0) -> tuple[str, Value, Value, str]:
        values = [getattr(t, get) for t in (plain, gated)]
        first, second = (v if v is None or factor == 1.0 else round(v * factor, 1) for v in values)
        return name, first, second, unit

    return [
        pair("connections unsuitable at the pause", "", "unsuitable_at_pause"),
        pair("guest stopped", "ms", "downtime_s", 1000.0),
        pair("held", "s", "held_s"),
        pair("total", "s", "total_s"),
        pair("sent", "MiB", "sent_bytes", 1 / (1 << 20)),
    ]


def render_comparison(
    timelines: Mapping[str, Timeline],
    figures: Sequence[tuple[str, Value, Value, str]] = (),
    *,
    title: str = "Plain and gated migration, side by side",
) -> str:
    """Two migrations under the same load. timelines: name -> timeline, plain first; figures: more rows
    as (name, plain, gated, unit), for instance what the clients measured.

    Errors: ValueError unless there are exactly two.
    """
    if len(timelines) != 2:
        raise ValueError("a comparison has two migrations")
    (plain_name, plain), (gated_name, gated) = timelines.items()
    rows = [*comparison_rows(plain, gated), *figures]

    def at_pause(timeline: Timeline) -> str:
        number = timeline.unsuitable_at_pause
        if number is None:
            return "while nobody counted connections"
        return f"while {count(number, 'connection')} {'was' if number == 1 else 'were'} unsuitable"

    waited = f"waited {format_duration(gated.held_s)} and " if gated.held_s is not None else ""
    sentence = (
        f"The {plain_name} migration stopped the guest {at_pause(plain)}; "
        f"the {gated_name} one {waited}stopped it {at_pause(gated)}."
    )
    parts: list[dict[str, Any]] = [
        {"name": name, "t": timeline, "verdict": verdict(timeline), "svg": _svg(timeline, most_lanes=40)}
        for name, timeline in timelines.items()
    ]
    began = f"{plain.started_at:%Y-%m-%d %H:%M} UTC" if plain.started_at else ""
    return (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            title=title,
            subtitle=f"{plain.domain}: {plain.source} → {plain.destination} · {began}",
            sentence=sentence,
            names=(plain_name, gated_name),
            rows=[
                {"name": clean(name), "plain": _shown(a), "gated": _shown(b), "unit": clean(unit)}
                for name, a, b, unit in rows
            ],
            parts=parts,
        )
    )

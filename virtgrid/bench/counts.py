"""How many connections were unsuitable over time, from journals. Pure.

Every change of a verdict is in the journal, so the count is known at any moment of a migration,
in a plain one as in a gated one. Unknown counts as unsuitable, as it does for the gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from virtgrid.report.figure import unsuitable_series
from virtgrid.report.timeline import Timeline

#: A capture that has just begun knows no connection yet; each is unknown until its next request.
SETTLE_S: Final = 5.0

Weighted = list[tuple[float, float]]
"""(count, seconds it stood)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Burstiness:
    """Unsuitable connections over time: the paper's load has bursts and nothing between them.

    zeros: share of the time with none. observed_s: how long was looked.
    """

    mean: float
    variance: float
    zeros: float
    lowest: float
    highest: float
    observed_s: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "mean": round(self.mean, 3),
            "variance": round(self.variance, 3),
            "zeros": round(self.zeros, 4),
            "lowest": self.lowest,
            "highest": self.highest,
            "observed_s": round(self.observed_s, 1),
        }


def weighted(timeline: Timeline, begin_s: float, end_s: float) -> Weighted:
    """The counts within a window of the timeline's axis, each with how long it stood."""
    if end_s <= begin_s:
        return []
    steps = unsuitable_series(timeline)
    out: Weighted = []
    count, from_s = 0.0, begin_s
    for at_s, value in steps:
        if at_s >= end_s:
            break
        if at_s > from_s:
            out.append((count, at_s - from_s))
            from_s = at_s
        count = value
    out.append((count, end_s - from_s))
    return out


def before_pause(timeline: Timeline, settle_s: float = SETTLE_S) -> Weighted:
    """The counts from when the capture knew its connections to the pause."""
    stop_s = timeline.stopped_s if timeline.stopped_s is not None else timeline.end_s
    series = unsuitable_series(timeline)
    return weighted(timeline, series[0][0] + settle_s, stop_s) if series else []


def while_held(timeline: Timeline) -> Weighted:
    """The counts the gate saw while it waited."""
    hold = timeline.hold
    if hold is None:
        return []
    end_s = hold.end_s if hold.end_s is not None else timeline.end_s
    return weighted(timeline, hold.start_s, end_s)


def burstiness(parts: Iterable[Weighted]) -> Burstiness | None:
    """Mean, variance and share of zeros over several windows; None when nothing was seen."""
    pairs = [pair for part in parts for pair in part if pair[1] > 0]
    total_s = sum(seconds for _, seconds in pairs)
    if not total_s:
        return None
    mean = sum(count * seconds for count, seconds in pairs) / total_s
    return Burstiness(
        mean=mean,
        variance=sum((count - mean) ** 2 * seconds for count, seconds in pairs) / total_s,
        zeros=sum(seconds for count, seconds in pairs if count == 0) / total_s,
        lowest=min(count for count, _ in pairs),
        highest=max(count for count, _ in pairs),
        observed_s=total_s,
    )


def share_below(pairs: Sequence[tuple[float, float]], count: float) -> float | None:
    """The share of the time in which fewer than ``count`` were unsuitable: 0 is the best moment of all.

    None when nothing was seen.
    """
    total_s = sum(seconds for _, seconds in pairs)
    return sum(seconds for value, seconds in pairs if value < count) / total_s if total_s else None

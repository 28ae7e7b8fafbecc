"""What the clients felt: the paper's quality of service, and a strict modern figure. Pure.

*Quality of service* (Ishikawa et al. 2011, section 5.2.1, after SPECweb2005): a request is Good
when answered within 3 s and Tolerable within 5 s; a download is Good at 99 kB/s or more on average
and Tolerable at 95 kB/s; everything else fails.

*Delayed requests*: today nobody waits 3 s. A small request counts as delayed when it took more than
100 ms longer than expected of it. Expected is the median time of the same URL in the same
load (a 40 KB page at a limited rate takes its time whether or not anyone migrates), plus the
session's own median deviation from that. Downloads are judged by their rate alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from virtgrid.lab.load.records import Request

GOOD_S: Final = 3.0
TOLERABLE_S: Final = 5.0
GOOD_BYTES_S: Final = 99_000.0
TOLERABLE_BYTES_S: Final = 95_000.0
DELAY_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Counts and their share; share is None when nothing was asked."""

    good: int
    tolerable: int
    failed: int

    @property
    def total(self) -> int:
        return self.good + self.tolerable + self.failed

    @property
    def good_tolerable(self) -> float | None:
        return (self.good + self.tolerable) / self.total if self.total else None


def grade(request: Request) -> str:
    """good, tolerable or failed, by the paper's limits."""
    if not request.ok:
        return "failed"
    if request.kind == "download":
        rate = request.count_bytes / max(request.duration_s, 1e-9)
        return "good" if rate >= GOOD_BYTES_S else "tolerable" if rate >= TOLERABLE_BYTES_S else "failed"
    took_s = request.duration_s
    return "good" if took_s <= GOOD_S else "tolerable" if took_s <= TOLERABLE_S else "failed"


def quality(requests: Iterable[Request], window: tuple[float, float] | None = None) -> Quality:
    """The quality of requests that overlap ``window`` (monotonic seconds; None: all)."""
    grades = [grade(request) for request in _within(requests, window)]
    return Quality(
        good=grades.count("good"), tolerable=grades.count("tolerable"), failed=grades.count("failed")
    )


def delayed(requests: Sequence[Request], window: tuple[float, float] | None = None) -> int:
    """Small requests in the window delayed by more than 100 ms; failed ones count as delayed."""
    small = [request for request in requests if request.kind != "download"]
    by_url: dict[str, list[float]] = defaultdict(list)
    for request in small:
        if request.ok:
            by_url[request.url].append(request.duration_s)
    usual = {url: median(times) for url, times in by_url.items()}
    deviations: dict[int, list[float]] = defaultdict(list)
    for request in small:
        if request.ok:
            deviations[request.session].append(request.duration_s - usual[request.url])
    session_usual = {session: median(values) for session, values in deviations.items()}
    return sum(
        1
        for request in _within(small, window)
        if not request.ok
        or request.duration_s - usual[request.url] - session_usual[request.session] > DELAY_S
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Answer times of one class, in seconds; None where there is nothing."""

    count: int
    mean_s: float | None
    median_s: float | None
    p99_s: float | None


def times(requests: Iterable[Request], kind: str) -> Times:
    """The answer times of the answered requests of a kind."""
    taken = sorted(request.duration_s for request in requests if request.kind == kind and request.ok)
    if not taken:
        return Times(count=0, mean_s=None, median_s=None, p99_s=None)
    return Times(
        count=len(taken),
        mean_s=sum(taken) / len(taken),
        median_s=median(taken),
        p99_s=taken[min(len(taken) - 1, math.ceil(len(taken) * 0.99) - 1)],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Burstiness:
    """How many connections had a small request outstanding, weighted by time."""

    mean: float
    variance: float
    zero_share: float
    peak: int


def burstiness(requests: Iterable[Request], window: tuple[float, float]) -> Burstiness:
    """The outstanding small requests over a window: the load's own view of what is unsuitable."""
    begin_s, end_s = window
    steps: list[tuple[float, int]] = []
    for request in requests:
        if request.kind != "download" and request.start_s < end_s and request.end_s > begin_s:
            steps.append((max(begin_s, request.start_s), 1))
            steps.append((min(end_s, request.end_s), -1))
    steps.sort()
    held: dict[int, float] = defaultdict(float)
    count, at_s = 0, begin_s
    for step_s, change in steps:
        held[count] += step_s - at_s
        count, at_s = count + change, step_s
    held[count] += end_s - at_s
    whole_s = max(end_s - begin_s, 1e-9)
    mean = sum(n * seconds for n, seconds in held.items()) / whole_s
    variance = sum((n - mean) ** 2 * seconds for n, seconds in held.items()) / whole_s
    occurring = [n for n, seconds in held.items() if seconds > 0]
    return Burstiness(
        mean=mean, variance=variance, zero_share=held.get(0, 0.0) / whole_s, peak=max(occurring, default=0)
    )


def _within(requests: Iterable[Request], window: tuple[float, float] | None) -> list[Request]:
    if window is None:
        return list(requests)
    begin_s, end_s = window
    return [request for request in requests if request.start_s < end_s and request.end_s > begin_s]

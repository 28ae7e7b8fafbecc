"""Migrations as Prometheus metrics: KubeVirt's names with our prefix where the
meaning is the same, and the hold. Pure.

One series for each migration that runs, by ``domain`` and ``id``, gone when it has ended; counters and
histograms over all that ended and have been seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from virtgrid.host.web.shelf import Ended, Seen, ended
from virtgrid.report.model import Outcome, State, Status
from virtgrid.report.objects import for_s

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_DOWNTIME_S: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
_TOTAL_S: Final = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0)
_PREFIX: Final = "virtgrid_migration_"

#: Of each that runs: name, what it is, its value (None: not known yet, and not said).
_RUNNING: Final[tuple[tuple[str, str, Callable[[Status], float | None]], ...]] = (
    (
        "data_remaining_bytes",
        "Memory still to be sent.",
        lambda s: None if s.ram is None else s.ram.remaining_bytes,
    ),
    ("data_processed_bytes", "Memory sent so far.", lambda s: None if s.ram is None else s.ram.sent_bytes),
    (
        "data_total_bytes",
        "Memory of the guest.",
        lambda s: None if s.ram is None else s.ram.total_bytes,
    ),
    (
        "dirty_memory_rate_bytes",
        "Memory the guest dirties, per second.",
        lambda s: None if s.ram is None else s.ram.dirty_bytes_s,
    ),
    (
        "memory_transfer_rate_bytes",
        "Memory sent, per second.",
        lambda s: None if s.ram is None else s.ram.speed_bytes_s,
    ),
    (
        "disk_transfer_rate_bytes",
        "Disks copied, per second.",
        lambda s: sum(disk.bytes_s or 0.0 for disk in s.disks) if s.disks else None,
    ),
    (
        "storage_copied_ratio",
        "How much of the disks has been copied.",
        lambda s: s.storage_fraction,
    ),
    ("hold_seconds", "How long the switchover has been held.", lambda s: s.held_s),
    (
        "connections_allowed_unsuitable",
        "Unsuitable connections the policy puts up with now.",
        lambda s: None if s.gate is None else s.gate.allowed,
    ),
)


def exposition(seen: Iterable[Seen], gone: Sequence[Ended], now: datetime) -> bytes:
    """All of it, in Prometheus' text format. gone: those no longer on the shelf."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected([one.status for one in seen if one.status is not None], gone, now))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, statuses: Sequence[Status], gone: Sequence[Ended], now: datetime) -> None:
        self._statuses, self._gone, self._now = statuses, gone, now

    def collect(self) -> Iterator[Metric]:
        running = [one for one in self._statuses if one.outcome is Outcome.RUNNING]
        over = [ended(one) for one in self._statuses if one.outcome is not Outcome.RUNNING]
        yield from self._of_each(running)
        yield from _of_all(running, [*self._gone, *over])

    def _of_each(self, running: Sequence[Status]) -> Iterator[Metric]:
        labels = ("domain", "id", "destination")
        for name, text, value in _RUNNING:
            metric = GaugeMetricFamily(_PREFIX + name, text, labels=labels)
            for one in running:
                if (found := value(one)) is not None:
                    metric.add_metric((one.domain, one.id, one.destination), found)
            yield metric
        counts = GaugeMetricFamily(
            _PREFIX + "connections",
            "The guest's connections, by verdict.",
            labels=(*labels, "verdict"),
        )
        phase = GaugeMetricFamily(
            _PREFIX + "phase_seconds", "How long it has been in its phase.", labels=(*labels, "phase")
        )
        for one in running:
            where = (one.domain, one.id, one.destination)
            if one.counts is not None:
                said = {
                    "suitable": one.counts.suitable,
                    "unsuitable": one.counts.unsuitable - one.counts.unknown,
                    "unknown": one.counts.unknown,
                }
                for verdict, number in said.items():
                    counts.add_metric((*where, verdict), number)
            lasted_s = for_s(one, self._now)
            if lasted_s is not None:
                phase.add_metric((*where, one.state), lasted_s)
        yield counts
        yield phase


def _of_all(running: Sequence[Status], over: Sequence[Ended]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "virtgrid_migrations_in_phase", "Migrations that run, by phase.", labels=("phase",)
    )
    by_state = Counter(one.state for one in running)
    for state in (State.PREPARING, State.STORAGE, State.PRECOPY, State.HOLDING, State.SWITCHING):
        states.add_metric((state,), by_state[state])
    yield states
    outcomes = CounterMetricFamily("virtgrid_migrations", "Migrations that ended.", labels=("outcome",))
    by_outcome = Counter(one.outcome for one in over)
    for outcome in Outcome:
        if outcome is not Outcome.RUNNING:
            outcomes.add_metric((outcome,), by_outcome[outcome])
    yield outcomes
    good = [one for one in over if one.outcome is Outcome.FINISHED]
    stood = [one.downtime_s for one in good]
    yield _histogram("downtime_seconds", "How long guests stood still.", _DOWNTIME_S, stood)
    yield _histogram("duration_seconds", "From the call to the end.", _TOTAL_S, [one.total_s for one in good])


def _histogram(
    name: str, text: str, bounds: Sequence[float], found: Sequence[float | None]
) -> HistogramMetricFamily:
    values = [value for value in found if value is not None]
    buckets = [(str(bound), float(sum(value <= bound for value in values))) for bound in bounds]
    buckets.append(("+Inf", float(len(values))))
    return HistogramMetricFamily(_PREFIX + name, text, buckets=buckets, sum_value=sum(values))

"""The tracker on the guest's tap: what ``watch.Watch`` is in production."""

from __future__ import annotations

from virtgrid.core.clock import SystemClock
from virtgrid.migration.plan import MigrationPlan
from virtgrid.migration.watch import Watch
from virtgrid.net.addresses import parse_mac
from virtgrid.net.capture import TapWatcher
from virtgrid.tracker.definition import load_all
from virtgrid.tracker.tracker import Change, Tracker
from virtgrid.tracker.views import Snapshot


def open_watch(plan: MigrationPlan) -> Watch:
    """Begin to follow the connections of the plan's domain. Errors: RefusedError, NotFoundError."""
    nic = plan.facts.tap
    assert nic is not None
    assert nic.tap is not None
    tracker = Tracker(load_all(), guest_macs=[parse_mac(nic.mac)], large_bytes=plan.request.large_bytes)
    return _TapWatch(TapWatcher(nic.tap, nic.mac, tracker, SystemClock()))


class _TapWatch:
    def __init__(self, watcher: TapWatcher[Snapshot, Change]) -> None:
        self._watcher = watcher
        self.capture = watcher.capture

    def snapshot(self) -> Snapshot:
        return self._watcher.snapshot()

    def changes(self) -> list[Change]:
        return self._watcher.drain_events()

    def unsuitable_at(self, at_s: float) -> int | None:
        return self._watcher.unsuitable_at(at_s)

    def addresses(self) -> tuple[str, ...]:
        return self._watcher.guest_addresses

    def close(self) -> None:
        self._watcher.close()

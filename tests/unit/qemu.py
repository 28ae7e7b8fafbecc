"""A small simulated precopy: QEMU's rules for when it looks, sends and completes, and a guest that writes.

The rules are the measured ones of virtgrid/virt/switchover.py's theory:

* windows of 100 ms; what may be sent in one is max-bandwidth / 10, and 0 after that division is no limit;
* complete when what is known to be left is 0 or less than a threshold, (bandwidth of the last window x
  downtime limit) in whole bytes; look at the guest's dirty pages (a sync) only when it is less than the
  threshold, so with a threshold of 0 not even when nothing is left;
* the bandwidth is the one told (avail-switchover-bandwidth) rather than the last window's, where the
  version knows that parameter: the drip kind does;
* a window whose allowance is used up does nothing at all, not even look;
* under max-bandwidth 10 the *strict* kind sends no page; the *drip* kind sends 32 pages a window under
  any limit.

Time passes only in ``advance``, in ticks of 10 ms. Answers come as QMP gives them, so that their parsing
is used too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from virtgrid.virt.jobstats import BlockJob, MigrationStatus, parse_block_jobs, parse_migration

PAGE_BYTES = 4096
TICK_S = 0.01
TICKS_PER_WINDOW = 10
DRIP_PAGES = 32
_HEADER_BYTES = 8
_ZERO_PAGE_BYTES = 9
_RING_PAGES = 256

Kind = Literal["strict", "drip"]


@dataclass(frozen=True, kw_only=True)
class GuestModel:
    """A guest that writes ``dirty_bytes_s`` evenly at random within a working set.

    ram_bytes: what a first pass has to send (pages that are zero cost QEMU nothing).
    tickle_every_s: frames arrive and dirty so many pages of the receive ring; None: nobody tickles.
    zero_share: of the ring's pages, so many are zero when QEMU comes to send them: a kernel that clears
    what it allocates dirties more pages than a few frames fill.
    """

    ram_bytes: int = 32 << 20
    dirty_bytes_s: float = 0.0
    working_set_bytes: int = 4 << 20
    tickle_every_s: float | None = 0.025
    tickle_pages: int = 1
    zero_share: float = 0.0


class SimulatedQemu:
    """One migration's memory phase, from its first byte to the stopped guest."""

    def __init__(self, kind: Kind, guest: GuestModel, link_bytes_s: float, *, seed: int = 0) -> None:
        self.kind = kind
        self.guest = guest
        self.link_bytes_s = link_bytes_s
        self.max_bandwidth = 0  # QMP: bytes a second, 0 is no limit
        self.downtime_limit_ms = 300
        self.switchover_bandwidth = 0  # 0: what was measured
        self.now_s = 0.0
        self.stopped_at_s: float | None = None
        self.pause_bytes = 0
        self.sent_bytes = 0
        self.dirtied_bytes = 0
        self.sync_count = 1
        self.commands: list[dict[str, int]] = []
        self._pages = guest.ram_bytes // PAGE_BYTES
        self._known = np.ones(self._pages, dtype=bool)
        self._log = np.zeros(self._pages, dtype=bool)
        self._known_pages = self._pages
        self._random = np.random.default_rng(seed)
        self._zero = np.zeros(self._pages, dtype=bool)
        ring = min(_RING_PAGES, self._pages)
        self._zero[-ring:] = np.random.default_rng(seed).random(ring) < guest.zero_share
        self._owed_writes = 0.0
        self._tickle_due_s = 0.0
        self._tick = 0
        self._window_sent = 0
        self._last_window_bytes_s = 0.0
        self._dirty_rate_pages_s = 0
        self._rate_since_s = 0.0
        self._rate_pages = 0

    # --- what QMP asks and tells ---------------------------------------------------------

    @property
    def completed(self) -> bool:
        return self.stopped_at_s is not None

    @property
    def remaining_bytes(self) -> int:
        return self._known_pages * PAGE_BYTES

    def query_migrate(self) -> dict[str, Any]:
        """``query-migrate``'s return value."""
        return {
            "status": "completed" if self.completed else "active",
            "total-time": round(self.now_s * 1000),
            "ram": {
                "remaining": self.remaining_bytes,
                "total": self._pages * PAGE_BYTES,
                "transferred": self.sent_bytes,
                "dirty-pages-rate": self._dirty_rate_pages_s,
                "page-size": PAGE_BYTES,
                "mbps": self._last_window_bytes_s * 8 / 1e6,
                "dirty-sync-count": self.sync_count,
                "normal-bytes": self.sent_bytes,
            },
        }

    def status(self) -> MigrationStatus:
        return parse_migration(self.query_migrate())

    def set_parameters(self, arguments: dict[str, int]) -> None:
        """``migrate-set-parameters``."""
        self.commands.append(arguments)
        self.max_bandwidth = arguments.get("max-bandwidth", self.max_bandwidth)
        self.downtime_limit_ms = arguments.get("downtime-limit", self.downtime_limit_ms)
        self.switchover_bandwidth = arguments.get("avail-switchover-bandwidth", self.switchover_bandwidth)

    # --- time ----------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Let time pass, in whole ticks; at least one."""
        for _ in range(max(1, round(seconds / TICK_S))):
            self.now_s += TICK_S
            if not self.completed:
                self._write()
                self._migrate()

    def _write(self) -> None:
        guest = self.guest
        self._owed_writes += guest.dirty_bytes_s * TICK_S / PAGE_BYTES
        writes, self._owed_writes = int(self._owed_writes), self._owed_writes % 1.0
        if writes:
            span = max(1, min(guest.working_set_bytes // PAGE_BYTES, self._pages))
            self._log[self._random.integers(0, span, writes)] = True
            self.dirtied_bytes += writes * PAGE_BYTES
        if guest.tickle_every_s is not None:
            while self._tickle_due_s <= self.now_s:
                # The ring lies at the end of memory; which of its pages are hit goes round.
                first = round(self._tickle_due_s / guest.tickle_every_s) * guest.tickle_pages
                slots = np.arange(first, first + guest.tickle_pages) % min(_RING_PAGES, self._pages)
                self._log[self._pages - 1 - slots] = True
                self.dirtied_bytes += PAGE_BYTES * guest.tickle_pages
                self._tickle_due_s += guest.tickle_every_s

    def _migrate(self) -> None:
        allowance = self.max_bandwidth // 10 or None
        carried = self.link_bytes_s * TICK_S  # what the wire takes in this tick
        if self.kind == "drip" and allowance is not None and carried > 0:
            carried = max(carried, DRIP_PAGES * PAGE_BYTES)
        while not self.completed and carried > 0 and (allowance is None or self._window_sent < allowance):
            if not self._iterate_may_send():
                break
            pages = self._batch(allowance, carried)
            if pages == 0:
                break
            self._send(pages)
            carried -= pages * PAGE_BYTES
        self._tick += 1
        if self._tick % TICKS_PER_WINDOW == 0:
            self._last_window_bytes_s = self._window_sent / (TICK_S * TICKS_PER_WINDOW)
            self._window_sent = 0

    def _iterate_may_send(self) -> bool:
        bandwidth = self.switchover_bandwidth or self._last_window_bytes_s
        threshold = int(bandwidth / 1000 * self.downtime_limit_ms)
        if self.remaining_bytes < threshold:
            self._sync()
        if self.remaining_bytes == 0 or self.remaining_bytes < threshold:
            self._sync()  # the last one, of the stopped guest
            self.stopped_at_s = self.now_s
            self.pause_bytes = self.remaining_bytes
            return False
        return True

    def _batch(self, allowance: int | None, carried: float) -> int:
        wire = max(1, int(carried // PAGE_BYTES))
        if allowance is None:
            return wire
        if self.kind == "drip":
            wanted = -(-(allowance - self._window_sent) // (DRIP_PAGES * PAGE_BYTES)) * DRIP_PAGES
            return min(max(wanted, DRIP_PAGES), max(wire, DRIP_PAGES))
        if self._window_sent == 0:
            self._window_sent = _HEADER_BYTES
            self.sent_bytes += _HEADER_BYTES
        if self._window_sent >= allowance:
            return 0
        return min(wire, -(-(allowance - self._window_sent) // PAGE_BYTES))

    def _send(self, pages: int) -> None:
        chosen = np.flatnonzero(self._known)[:pages]
        self._known[chosen] = False
        self._known_pages -= len(chosen)
        zero = int(np.count_nonzero(self._zero[chosen]))
        sent = (len(chosen) - zero) * PAGE_BYTES + zero * _ZERO_PAGE_BYTES
        self._window_sent += sent
        self.sent_bytes += sent

    def _sync(self) -> None:
        found = np.count_nonzero(self._log & ~self._known)
        self._rate_pages += int(np.count_nonzero(self._log))
        self._known |= self._log
        self._log[:] = False
        self._known_pages += int(found)
        self.sync_count += 1
        if self.now_s - self._rate_since_s > 1.0:
            self._dirty_rate_pages_s = round(self._rate_pages / (self.now_s - self._rate_since_s))
            self._rate_since_s, self._rate_pages = self.now_s, 0


class ScriptedMonitor:
    """``virt.monitor.Monitor`` over a simulated QEMU; time passes with every question.

    poll_s: simulated seconds between two questions. storage_polls: how many questions are answered
    with mirrors still copying before memory begins. cuts: how often the copies were broken off.
    """

    def __init__(self, qemu: SimulatedQemu, *, poll_s: float = 0.03, storage_polls: int = 0) -> None:
        self.qemu = qemu
        self.poll_s = poll_s
        self.asked = 0
        self.cuts = 0
        self._storage_polls = storage_polls

    async def migration(self) -> MigrationStatus:
        self.asked += 1
        if self.asked <= self._storage_polls:
            return parse_migration({"status": "active"})
        self.qemu.advance(self.poll_s)
        return self.qemu.status()

    async def block_jobs(self) -> tuple[BlockJob, ...]:
        length = 1 << 30
        offset = min(length, length * self.asked // max(1, self._storage_polls))
        ready = self.asked >= self._storage_polls
        job = {"type": "mirror", "device": "drive-virtio-disk0", "offset": offset, "len": length}
        return parse_block_jobs([job | {"ready": ready, "status": "ready" if ready else "running"}])

    async def cut_storage(self) -> int:
        self.cuts += 1
        return 1

    async def parameters(self) -> dict[str, Any]:
        told = {"max-bandwidth": self.qemu.max_bandwidth, "downtime-limit": self.qemu.downtime_limit_ms}
        if self.qemu.kind == "drip":
            told["avail-switchover-bandwidth"] = self.qemu.switchover_bandwidth
        return told

    async def set_limits(
        self,
        *,
        bandwidth_bytes_s: int | None = None,
        downtime_s: float | None = None,
        switchover_bytes_s: int | None = None,
    ) -> None:
        arguments: dict[str, int] = {}
        if bandwidth_bytes_s is not None:
            arguments["max-bandwidth"] = bandwidth_bytes_s
        if downtime_s is not None:
            arguments["downtime-limit"] = round(downtime_s * 1000)
        if switchover_bytes_s is not None:
            arguments["avail-switchover-bandwidth"] = switchover_bytes_s
        self.qemu.set_parameters(arguments)

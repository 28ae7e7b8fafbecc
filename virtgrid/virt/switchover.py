"""Holding the switchover of a running precopy, and letting it go. Pure: statistics in, commands out.

Theory of operation (QEMU, measured; migration/migration.c decides once per 100 ms window)
-----------------------------------------------------------------------------------------
QEMU stops the guest when what it *believes* to be left is nothing, or less than
``bandwidth of the last window x downtime limit``. It looks at the guest's dirty pages (a *sync*)
only when that belief falls under the threshold or a pass ends. Hence:

* a downtime limit of 0 is no hold: nothing is ever synced, one pass and out;
* a limit of 1 ms is no hold either: a quiet guest has nothing left and completes;
* with the limit at 1 ms and the bandwidth clamped, QEMU can never believe it is done as long
  as something is left, because nothing more goes out;
* the threshold is whole bytes. A window in which only zero pages went out, a few bytes each, makes it 0, and
  then nothing is synced any more, as above: an idle guest's kernel clears what it allocates, so its last
  pages often are zero. Where QEMU takes it (8.2) it is told what bandwidth to believe in: 1,000 bytes of
  threshold, never nothing and never a page;
* a window that sends all that is left syncs again at once. Found empty a second time within milliseconds, a
  quiet guest is complete: its limit follows what is left down. A busy one needs short cycles instead.

So: watch the first pass come down, *land* (slow down in proportion to what is left, so that a
little remains when we stop), then *clamp* with ``max-bandwidth=10`` (bytes per second; QEMU
divides by ten windows, so 1 to 9 would mean unlimited, as does 0).

What a clamp does differs, and is found out by looking, never by a version number:

* *strict* (QEMU 7.2): not a page leaves. The picture of the guest gets old, so it is refreshed on
  purpose: some bandwidth until the next sync, then land again. Slowly: nobody knows what the sync will
  find, and what it finds must last until we look again. What it finds in a quiet guest are the pages of
  a tickled receive ring; without a tap to tickle only a guest known to write is refreshed.
* *drip* (QEMU 10): one batch of 32 pages a window gets out whatever the limit, 1.3 MB/s. This
  refreshes by itself; but a guest that writes nothing would drain and complete. A small frame to
  its tap every few tens of ms dirties pages of its receive ring: *tickled*. Without a tap to
  tickle the hold is *best-effort*.

How fast to drip is the pause's budget: the pause has to send what is left plus what was dirtied
since the sync, about ``dirty rate x cycle``; more drip means a shorter cycle.

States
------
``FULL``     at the bandwidth libvirt set; what is left is above the landing mark
``LANDING``  slowing down towards the target; from FULL, or from REFRESH after its sync
``CLAMPED``  held; measuring what gets out (until ``kind`` is known)
``HELD``     held; kind known
``REFRESH``  strict only: bandwidth until the next sync; then as what it found is much or little
``RELEASED`` let go; there is no way back from here, only QEMU's own end
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from virtgrid.virt.jobstats import RamStats

#: The clamp itself. See the theory above before touching it.
CLAMP_BYTES_S: Final = 10
#: What QEMU 10 lets out under any clamp: 32 pages of 4 KiB in each of ten windows a second.
DRIP_FLOOR_BYTES_S: Final = 1_310_720
#: A guest that is seen to write less may be quiet but for the tickling, which is some 1.5 MB/s of it.
QUIET_BYTES_S: Final = 2 * DRIP_FLOOR_BYTES_S
#: The downtime limit while holding; libvirt's smallest.
HOLD_DOWNTIME_S: Final = 0.001
#: What QEMU is told a switchover would have, where it takes that (8.2): the threshold is then a thousand
#: bytes whatever the last window sent; never nothing, and never a page.
HOLD_SWITCHOVER_BYTES_S: Final = 1_000_000
#: The downtime limit of a release (QEMU's largest): the budget was checked by the gate before,
#: and QEMU's own check would use the clamped window's bandwidth, which says nothing.
RELEASE_DOWNTIME_S: Final = 2000.0


class HoldMode(StrEnum):
    """Where the hold stands; see the module's text."""

    FULL = "full"
    LANDING = "landing"
    CLAMPED = "clamped"
    HELD = "held"
    REFRESH = "refresh"
    RELEASED = "released"


class HoldKind(StrEnum):
    """What kind of hold was found, by bytes sent after clamping."""

    STRICT = "strict"
    TICKLED = "tickled"
    BEST_EFFORT = "best-effort"


#: What may follow what. docs/reference/hold.md draws its diagram from this table.
TRANSITIONS: Final[dict[HoldMode, frozenset[HoldMode]]] = {
    HoldMode.FULL: frozenset({HoldMode.LANDING, HoldMode.CLAMPED, HoldMode.HELD, HoldMode.RELEASED}),
    HoldMode.LANDING: frozenset({HoldMode.FULL, HoldMode.CLAMPED, HoldMode.HELD, HoldMode.RELEASED}),
    HoldMode.CLAMPED: frozenset({HoldMode.HELD, HoldMode.RELEASED}),
    HoldMode.HELD: frozenset({HoldMode.REFRESH, HoldMode.RELEASED}),
    HoldMode.REFRESH: frozenset({HoldMode.FULL, HoldMode.LANDING, HoldMode.HELD, HoldMode.RELEASED}),
    HoldMode.RELEASED: frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldConfig:
    """The numbers of a hold.

    full_bytes_s: what libvirt told QEMU before we came (restored at the release).
    mark_min_bytes, mark_s: landing begins at max(mark_min, mark_s x speed): late enough not to
        cost time, early enough that a controller busy for a second does not miss it.
    target_bytes: what should remain when clamping, but no more than a quarter of the budget.
    landing_per_s: the share of the rest sent a second while landing; refresh_per_s: in a refresh.
    detect_*_s: bytes are counted between these two moments after clamping.
    strict_bytes: less than this between them means strict.
    budget_bytes: what a pause may have to send; a refresh keeps the guest's picture below it.
    drip_share: at most this share of the speed seen is spent on dripping, unless a pause would not
        fit the budget anyway. slower_after_s: a drip is slowed down no faster.
    tickled: a tap is being tickled.
    """

    full_bytes_s: int
    budget_bytes: int
    mark_min_bytes: int = 4 << 20
    mark_s: float = 1.0
    target_bytes: int = 256 << 10
    landing_per_s: float = 3.0
    refresh_per_s: float = 2.0
    landing_floor_bytes_s: int = 200_000
    detect_from_s: float = 0.2
    detect_until_s: float = 0.7
    strict_bytes: int = 64 << 10
    refresh_min_s: float = 1.0
    refresh_max_s: float = 5.0
    drip_share: float = 0.5
    slower_after_s: float = 0.5
    tickled: bool = True

    @property
    def landing_bytes(self) -> int:
        """What should remain when clamping. On a slow link the target alone would burst the budget."""
        return min(self.target_bytes, self.budget_bytes // 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldState:
    """Where a hold stands. Times are the caller's monotonic seconds.

    speed_bytes_s: the best speed seen while nothing was limited; sync_s: when QEMU last looked.
    drip_bytes_s: what the clamp was seen to let out; slower_at_s: not slowed down before.
    """

    mode: HoldMode = HoldMode.FULL
    limit_bytes_s: int | None = None
    kind: HoldKind | None = None
    held_since_s: float | None = None
    clamped_at_s: float | None = None
    detect_from: tuple[float, int] | None = None
    sync_count: int = -1
    sync_s: float = 0.0
    speed_bytes_s: float = 0.0
    last_sent: tuple[float, int] | None = None
    drip_bytes_s: float = 0.0
    slower_at_s: float = 0.0

    @property
    def holding(self) -> bool:
        """The guest is held: clamped once, and not let go since (refreshing and landing again included)."""
        return self.held_since_s is not None and self.mode is not HoldMode.RELEASED


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitCommand:
    """Tell QEMU this. downtime_s None: leave it."""

    bandwidth_bytes_s: int
    reason: str
    downtime_s: float | None = None


def step(
    state: HoldState, ram: RamStats, now_s: float, config: HoldConfig
) -> tuple[HoldState, LimitCommand | None]:
    """One look at the precopy -> the new state and what to tell QEMU, if anything.

    Called every few tens of ms while memory is copied; never after the release.
    """
    state = _account(state, ram, now_s)
    match state.mode:
        case HoldMode.FULL | HoldMode.LANDING:
            return _approach(state, ram, now_s, config)
        case HoldMode.CLAMPED:
            return _detect(state, ram, now_s, config), None
        case HoldMode.HELD:
            return _keep(state, ram, now_s, config)
        case HoldMode.REFRESH:
            if state.sync_s > (state.clamped_at_s or 0.0):  # QEMU has looked since the refresh began
                return _approach(replace(state, mode=HoldMode.LANDING), ram, now_s, config)
            return state, None
        case HoldMode.RELEASED:
            return state, None


def release(state: HoldState, config: HoldConfig) -> tuple[HoldState, LimitCommand]:
    """Let go: full bandwidth and a downtime limit that cannot be missed, in one command."""
    command = LimitCommand(
        bandwidth_bytes_s=config.full_bytes_s, downtime_s=RELEASE_DOWNTIME_S, reason="released"
    )
    return replace(state, mode=HoldMode.RELEASED, limit_bytes_s=config.full_bytes_s), command


def since_sync_s(state: HoldState, now_s: float) -> float:
    """How old QEMU's picture of the guest is, in seconds."""
    return max(0.0, now_s - state.sync_s) if state.sync_count >= 0 else 0.0


def pause_bytes(state: HoldState, ram: RamStats, now_s: float) -> float:
    """What a pause beginning now would have to send: what is left and what was dirtied since."""
    return ram.remaining_bytes + ram.dirty_bytes_s * since_sync_s(state, now_s)


def _account(state: HoldState, ram: RamStats, now_s: float) -> HoldState:
    """Keep the running figures: syncs, and the speed while nothing limits it."""
    if not state.speed_bytes_s and ram.speed_bytes_s:
        # QEMU's own figure until there is one of ours: a guest that is nearly done at the first look
        # would never be let go, its pause being unknown.
        state = replace(state, speed_bytes_s=ram.speed_bytes_s)
    if ram.sync_count != state.sync_count:
        state = replace(state, sync_count=ram.sync_count, sync_s=now_s)
    if state.last_sent is None or now_s - state.last_sent[0] >= 0.25:
        if state.last_sent is not None and state.mode is HoldMode.FULL:
            speed = (ram.sent_bytes - state.last_sent[1]) / (now_s - state.last_sent[0])
            # A decaying maximum: one lucky burst into an empty socket buffer must not stay for ever.
            state = replace(state, speed_bytes_s=max(speed, state.speed_bytes_s * 0.9))
        state = replace(state, last_sent=(now_s, ram.sent_bytes))
    return state


def _approach(
    state: HoldState, ram: RamStats, now_s: float, config: HoldConfig
) -> tuple[HoldState, LimitCommand | None]:
    """FULL and LANDING: come down so as to arrive small, then clamp."""
    left = ram.remaining_bytes
    target_bytes = config.landing_bytes
    if left <= target_bytes * 3 // 2:
        clamped = replace(
            state,
            mode=HoldMode.CLAMPED if state.kind is None else HoldMode.HELD,
            limit_bytes_s=CLAMP_BYTES_S,
            clamped_at_s=now_s,
            detect_from=None,
            held_since_s=now_s if state.held_since_s is None else state.held_since_s,
        )
        return clamped, LimitCommand(bandwidth_bytes_s=CLAMP_BYTES_S, reason="clamped")
    if left <= max(config.mark_min_bytes, config.mark_s * state.speed_bytes_s):
        limit = max(config.landing_floor_bytes_s, round((left - target_bytes) * config.landing_per_s))
        # QEMU need not hear of every few percent.
        if state.limit_bytes_s and abs(limit - state.limit_bytes_s) <= 0.1 * state.limit_bytes_s:
            return replace(state, mode=HoldMode.LANDING), None
        landing = replace(state, mode=HoldMode.LANDING, limit_bytes_s=limit)
        return landing, LimitCommand(bandwidth_bytes_s=limit, reason="landing")
    if state.mode is HoldMode.LANDING:
        # A sync found more than the mark: up again, but not past what was asked for.
        full = replace(state, mode=HoldMode.FULL, limit_bytes_s=config.full_bytes_s)
        return full, LimitCommand(bandwidth_bytes_s=config.full_bytes_s, reason="full")
    return state, None


def _detect(state: HoldState, ram: RamStats, now_s: float, config: HoldConfig) -> HoldState:
    """CLAMPED: count what gets out between two moments, then the kind is known."""
    assert state.clamped_at_s is not None
    since = now_s - state.clamped_at_s
    if state.detect_from is None:
        if since >= config.detect_from_s:
            state = replace(state, detect_from=(now_s, ram.sent_bytes))
        return state
    began_s, began_bytes = state.detect_from
    if since < config.detect_until_s or now_s - began_s < 0.3:
        return state
    sent = ram.sent_bytes - began_bytes
    if sent < config.strict_bytes:
        kind = HoldKind.STRICT
    else:
        kind = HoldKind.TICKLED if config.tickled else HoldKind.BEST_EFFORT
    return replace(state, mode=HoldMode.HELD, kind=kind, drip_bytes_s=sent / (now_s - began_s))


def _keep(
    state: HoldState, ram: RamStats, now_s: float, config: HoldConfig
) -> tuple[HoldState, LimitCommand | None]:
    """HELD: keep the picture of the guest young enough for the pause's budget."""
    if state.kind is HoldKind.STRICT:
        assert state.clamped_at_s is not None
        old = now_s - max(state.clamped_at_s, state.sync_s) >= config.refresh_min_s
        # Nothing dirty is seen without a sync, so the last rate stands for the present one. Where
        # the rate says nothing (a first pass never measured it) the picture is refreshed on time.
        # A guest may also wake up: what was a quiet picture is not believed for ever.
        wanted = (
            pause_bytes(state, ram, now_s) > config.budget_bytes / 2
            or ram.dirty_bytes_s == 0
            or since_sync_s(state, now_s) >= config.refresh_max_s
        )
        if old and wanted and (config.tickled or ram.dirty_bytes_s > 0):
            limit = max(config.landing_floor_bytes_s, round(ram.remaining_bytes * config.refresh_per_s))
            refreshing = replace(state, mode=HoldMode.REFRESH, limit_bytes_s=limit, clamped_at_s=now_s)
            return refreshing, LimitCommand(bandwidth_bytes_s=limit, reason="refresh")
        return state, None
    return _drip(state, ram, now_s, config)


def _drip(
    state: HoldState, ram: RamStats, now_s: float, config: HoldConfig
) -> tuple[HoldState, LimitCommand | None]:
    """HELD with a drip: as slow as the pause's budget permits.

    Ruled by what a pause would have to send, not by the dirty rate: short cycles find the same hot
    pages again and again, so a faster drip measures a faster guest and would never slow down.
    """
    pending = pause_bytes(state, ram, now_s)
    told = limit = state.limit_bytes_s or CLAMP_BYTES_S
    left = round(ram.remaining_bytes * config.landing_per_s)
    if pending > config.budget_bytes / 2:
        # A pass that found much (the first sync sees all that was dirtied since the start) is sent
        # off in proportion to what is left of it, at full speed if need be: nobody could let go yet.
        ceiling = config.drip_share * state.speed_bytes_s
        if pending > config.budget_bytes:
            ceiling = max(ceiling, state.speed_bytes_s)
        limit = min(round(ceiling), left)
    elif pending <= config.budget_bytes / 4 and now_s >= state.slower_at_s:
        limit = told // 2
    if ram.dirty_bytes_s < QUIET_BYTES_S:
        # Where a window drains all that is left, QEMU syncs twice within milliseconds, finds a quiet guest
        # clean, and completes. Half as fast as a landing: zero pages count, and leave for nothing.
        limit = min(limit, left // 2)
    if limit <= DRIP_FLOOR_BYTES_S:
        limit = CLAMP_BYTES_S
    # QEMU need not hear of every few percent.
    if abs(limit - told) <= 0.2 * told:
        return state, None
    held = replace(state, limit_bytes_s=limit, slower_at_s=now_s + config.slower_after_s)
    return held, LimitCommand(bandwidth_bytes_s=limit, reason="drip")

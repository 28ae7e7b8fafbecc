"""What one user may have at a time of all that a coordinator can promise. Pure.

Counted is what is *open*: asked for, reserved, or still being given back; refused, cancelled and past
reservations count nothing. Node time is what lies ahead: nodes times the seconds of their windows that have
not passed. Bandwidth is the most that is promised at any one moment, over all paths of all reservations, so
two that do not overlap in time do not add up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from virtgrid.core.errors import RefusedError
from virtgrid.core.units import format_duration, format_time
from virtgrid.grid.messages.coalloc import Reserve


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None: no limit. said: where the limits are written, for the hint."""

    reservations: int | None = None
    node_time_s: int | None = None
    bandwidth_bytes_s: int | None = None
    said: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one reservation takes. rate_bytes_s: summed over its paths."""

    begins_at_s: int
    ends_at_s: int
    nodes: int
    rate_bytes_s: int

    def node_time_s(self, now_s: int) -> int:
        """What of it lies ahead."""
        return self.nodes * max(0, self.ends_at_s - max(self.begins_at_s, now_s))


def use_of(wish: Reserve) -> Use:
    """What a reservation takes, when it is made."""
    sites = len(wish.sites)
    return Use(
        begins_at_s=wish.window.begins_at_s,
        ends_at_s=wish.window.ends_at_s,
        nodes=sum(one.nodes for one in wish.sites),
        rate_bytes_s=(wish.bandwidth_bytes_s or 0) * (sites * (sites - 1) // 2),
    )


def require_within(limits: Limits, before: Collection[Use], more: Use, *, who: str, now_s: int) -> None:
    """Whether there may be one more beside those that are open. Errors: RefusedError, with the limit."""
    if limits.reservations is not None and len(before) >= limits.reservations:
        some = "1 reservation" if len(before) == 1 else f"{len(before)} reservations"
        what = f"{who} has {some} open, and {limits.reservations} may be"
        raise _too_much(what, "reservations", limits)
    if limits.node_time_s is not None:
        ahead_s = sum(one.node_time_s(now_s) for one in (*before, more))
        if ahead_s > limits.node_time_s:
            what = f"with this one {who} would have {format_duration(ahead_s)} of node time ahead"
            raise _too_much(
                f"{what}, and {format_duration(limits.node_time_s)} are allowed", "node_time", limits
            )
    if limits.bandwidth_bytes_s is not None and more.rate_bytes_s:
        rate_bytes_s, at_s = most(before, more)
        if rate_bytes_s > limits.bandwidth_bytes_s:
            what = f"with this one {who} would have {_mbit(rate_bytes_s)} at {format_time(at_s)}"
            raise _too_much(f"{what}, and {_mbit(limits.bandwidth_bytes_s)} are allowed", "bandwidth", limits)


def most(before: Collection[Use], more: Use) -> tuple[int, int]:
    """The most bandwidth at any moment of a new one's window, itself included, and a moment when it is so."""
    beside = [
        one
        for one in before
        if one.rate_bytes_s and one.begins_at_s < more.ends_at_s and more.begins_at_s < one.ends_at_s
    ]
    changes = [(max(one.begins_at_s, more.begins_at_s), one.rate_bytes_s) for one in beside]
    changes += [(one.ends_at_s, -one.rate_bytes_s) for one in beside if one.ends_at_s < more.ends_at_s]
    used, found, when_s = 0, 0, more.begins_at_s
    for at_s, by in sorted(changes):  # what ends at a moment goes before what begins then
        used += by
        if used > found:
            found, when_s = used, at_s
    return found + more.rate_bytes_s, when_s


def _too_much(what: str, key: str, limits: Limits) -> RefusedError:
    return RefusedError(what, hint=f"cancel another one; the limit is {key} of [quota] in {limits.said}")


def _mbit(rate_bytes_s: int) -> str:
    return f"{rate_bytes_s * 8 / 1e6:.6g} Mbit/s"

"""What a network manager has to give: segments, each of which isolates one reservation, and bandwidth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from sqlalchemy import Connection

from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.core.units import parse_rate
from virtgrid.grid.coalloc.windows import Times, beginnings, common
from virtgrid.grid.messages.coalloc import AskOffer, Grant, Hold, Offer, Party, Paths, Span, Wanted, Window
from virtgrid.grid.messages.common import require
from virtgrid.grid.store import levels, units
from virtgrid.grid.store.promises import UnavailableError

_LOOKED_AT: Final = 4096
"""Segments looked at for one that is free: all VLAN tags, and more VXLAN numbers than reservations at a
time.
"""
_AT_ONCE: Final = 64
_RESTING: Final = 4 * _AT_ONCE
"""Segments looked at for one that has rested; then any one will do."""
REST_S: Final = 60
"""So long a segment is left alone between two reservations, while there are others."""

Link = tuple[str, str]
"""Two sites, in the order of their names."""


def link_name(between: Link) -> str:
    """How a link is called in the table and to people."""
    return f"{between[0]}-{between[1]}"


def parse_link(text: str) -> tuple[Link, int]:
    """``alpha:beta=1gbit`` -> the sites in order, bytes per second. Errors: UsageError."""
    sites, _, rate = text.partition("=")
    one, _, other = sites.partition(":")
    for site in (one, other):
        require(Party, "--link", site)
    if one == other:
        raise UsageError(f"--link: '{text[:80]}' is a link of a site with itself")
    return (min(one, other), max(one, other)), round(parse_rate(rate))


def parse_segments(text: str) -> tuple[int, int]:
    """``1000-4094`` -> first and last. Errors: UsageError."""
    found = re.fullmatch(r"([0-9]{1,8})-([0-9]{1,8})", text)
    if found is None:
        raise UsageError(f"--segments: '{text[:80]}' is no range", hint="1000-4094, for instance")
    return int(found[1]), int(found[2])


class NetworkStock:
    """links: bytes per second each way. segments: the first and the last tag it may give out."""

    def __init__(self, *, links: Mapping[Link, int], segments: tuple[int, int]) -> None:
        self.links = dict(links)
        self._first, self._last = segments
        if not 1 <= self._first <= self._last < 1 << 24:
            raise RefusedError(f"segments {self._first}-{self._last} are none", hint="1-4094 for VLAN tags")
        looked_at = range(self._first, min(self._last + 1, self._first + _LOOKED_AT))
        self._tags = tuple(str(tag) for tag in looked_at)
        for link, capacity in links.items():
            if link[0] >= link[1] or capacity < 1:
                raise RefusedError(f"link {link_name(link)} is none", hint="two sites, and a capacity")

    def prepare(self, connection: Connection) -> None:
        levels.set_links(connection, {link_name(link): rate for link, rate in self.links.items()})

    def check(self, wanted: Wanted) -> None:
        if not isinstance(wanted, Paths):
            raise RefusedError("a network manager has segments and paths, and no nodes")
        if wanted.segment is not None and not self._first <= wanted.segment <= self._last:
            raise RefusedError(
                f"segment {wanted.segment} is out of range", hint=f"{self._first} to {self._last}"
            )
        for path in wanted.paths:
            capacity = self.links.get(path.between)
            if capacity is None:
                raise RefusedError(f"there is no link between {path.between[0]} and {path.between[1]}")
            if path.rate_bytes_s > capacity:
                raise RefusedError(
                    f"{_mbit(path.rate_bytes_s)} were asked for on {link_name(path.between)},"
                    f" which has {_mbit(capacity)}"
                )

    def take(self, connection: Connection, asked: Hold) -> Grant:
        wanted, window = asked.wanted, asked.window
        assert isinstance(wanted, Paths)
        segment = self._free_segment(connection, wanted, window)
        for path in wanted.paths:
            name = link_name(path.between)
            left = self.links[path.between] - levels.most(connection, name, window)
            if left < path.rate_bytes_s:
                raise UnavailableError(
                    f"{_mbit(path.rate_bytes_s)} were asked for on {name}, and {_mbit(max(left, 0))} are left"
                )
        units.take(connection, asked.key, units.SEGMENT, [segment], window)
        for path in wanted.paths:
            levels.add(connection, asked.key, link_name(path.between), window, path.rate_bytes_s)
        return Grant(segment=int(segment), sites=wanted.sites, paths=wanted.paths)

    def begins(
        self, connection: Connection, wanted: Wanted, lasts_s: int, near_s: int, within: Times
    ) -> list[Span]:
        assert isinstance(wanted, Paths)
        segments = units.timetable(connection, units.SEGMENT, self._candidates(wanted), near_s, within)
        found = beginnings(segments, need=1, lasts_s=lasts_s)
        for path in wanted.paths:
            room = levels.timetable(connection, link_name(path.between), path.rate_bytes_s, near_s, within)
            found = common(found, beginnings([room], need=1, lasts_s=lasts_s))
        return found

    def offer(self, connection: Connection, asked: AskOffer) -> Offer:
        raise RefusedError("a network manager has no nodes to offer")

    def _free_segment(self, connection: Connection, wanted: Paths, window: Window) -> str:
        """One that rests before and after, so that it can be made ahead and nobody's leftovers are in it;
        else, at the last, one that is just free.
        """
        candidates = self._candidates(wanted)
        begins_s, ends_s = window.begins_at_s, window.ends_at_s
        resting = Window.model_construct(begins_at_s=max(0, begins_s - REST_S), ends_at_s=ends_s + REST_S)
        for times, looked_at in ((resting, candidates[:_RESTING]), (window, candidates)):
            for at in range(0, len(looked_at), _AT_ONCE):
                some = looked_at[at : at + _AT_ONCE]
                if free := units.free(connection, units.SEGMENT, some, times, want=1):
                    return free[0]
        which = "no segment is free" if wanted.segment is None else f"segment {wanted.segment} is taken"
        raise UnavailableError(which)

    def _candidates(self, wanted: Paths) -> Sequence[str]:
        return self._tags if wanted.segment is None else [str(wanted.segment)]


def _mbit(rate_bytes_s: int) -> str:
    return f"{rate_bytes_s * 8 / 1e6:.4g} Mbit/s"

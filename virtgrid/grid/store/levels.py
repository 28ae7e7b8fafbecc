"""What many share: the bandwidth of links, over time. Tables ``link``, ``level`` and ``flow``.

A link's use is a step function, kept as its steps: from ``at_s`` until the next row so much is promised. A
hold adds its rate to the steps of its window, so what a question costs depends on the steps within a window
and not on the number of reservations. Whole bytes per second: sums are exact, and giving back leaves what
was before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from virtgrid.grid.coalloc.windows import Times, gaps
from virtgrid.grid.messages.coalloc import Window
from virtgrid.grid.store.schema import flow, hold, level, link

_STEPS: Final = 2000
"""Looked at before and after a time to find a nearest window; beyond them nobody looks."""


# Made once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_AT = (
    select(level.c.used_bytes_s)
    .where(level.c.link == bindparam("name"), level.c.at_s <= bindparam("at_s"))
    .order_by(level.c.at_s.desc())
    .limit(1)
)
_MOST = select(func.max(level.c.used_bytes_s)).where(
    level.c.link == bindparam("name"),
    level.c.at_s >= bindparam("begins_s"),
    level.c.at_s < bindparam("ends_s"),
)
_BEFORE = (
    select(level.c.at_s, level.c.used_bytes_s)
    .where(
        level.c.link == bindparam("name"),
        level.c.at_s < bindparam("near_s"),
        level.c.at_s >= bindparam("from_s"),
    )
    .order_by(level.c.at_s.desc())
    .limit(_STEPS)
)
_AFTER = (
    select(level.c.at_s, level.c.used_bytes_s)
    .where(
        level.c.link == bindparam("name"),
        level.c.at_s >= bindparam("near_s"),
        level.c.at_s < bindparam("until_s"),
    )
    .order_by(level.c.at_s)
    .limit(_STEPS)
)
_STEP = upsert(level).on_conflict_do_nothing()
_RAISE = (
    update(level)
    .where(
        level.c.link == bindparam("name"),
        level.c.at_s >= bindparam("begins_s"),
        level.c.at_s < bindparam("ends_s"),
    )
    .values(used_bytes_s=level.c.used_bytes_s + bindparam("by"))
)
_FLOWS = (
    select(flow.c.link, flow.c.rate_bytes_s, hold.c.begins_at_s, hold.c.ends_at_s)
    .join(hold, hold.c.key == flow.c.hold)
    .where(flow.c.hold == bindparam("key"))
)


def set_links(connection: Connection, capacities: Mapping[str, int]) -> None:
    """Which links there are, in bytes per second. Less than is promised already only stops new holds."""
    for name, capacity_bytes_s in capacities.items():
        statement = upsert(link).values(name=name, capacity_bytes_s=capacity_bytes_s)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["name"], set_={"capacity_bytes_s": capacity_bytes_s}
            )
        )


def most(connection: Connection, name: str, window: Window) -> int:
    """The most that is promised of a link at any moment of a window."""
    times = {"begins_s": window.begins_at_s, "ends_s": window.ends_at_s}
    found = connection.execute(_MOST, {"name": name, **times}).scalar()
    return max(found or 0, _at(connection, name, window.begins_at_s))


def add(connection: Connection, key: str, name: str, window: Window, rate_bytes_s: int) -> None:
    """A hold takes so much of a link. Errors: IntegrityError when the link has not as much."""
    connection.execute(insert(flow).values(hold=key, link=name, rate_bytes_s=rate_bytes_s))
    _raise(connection, name, (window.begins_at_s, window.ends_at_s), rate_bytes_s)


def give_back(connection: Connection, key: str) -> None:
    """What a hold has of all links."""
    rows = connection.execute(_FLOWS, {"key": key}).all()
    for row in rows:
        _raise(connection, row.link, (row.begins_at_s, row.ends_at_s), -row.rate_bytes_s)
    if rows:
        connection.execute(delete(flow).where(flow.c.hold == key))


def timetable(
    connection: Connection, name: str, rate_bytes_s: int, near_s: int, within: Times
) -> list[Times]:
    """The times at which a link has so much left, around a time: within a horizon, or as far as ``_STEPS``
    reach.
    """
    capacity = connection.execute(select(link.c.capacity_bytes_s).where(link.c.name == name)).scalar() or 0
    before = connection.execute(_BEFORE, {"name": name, "near_s": near_s, "from_s": within[0]}).all()
    after = connection.execute(_AFTER, {"name": name, "near_s": near_s, "until_s": within[1]}).all()
    from_s = before[-1].at_s if len(before) == _STEPS else min(within[0], near_s)
    until_s = after[-1].at_s if len(after) == _STEPS else within[1]
    steps = [(from_s, _at(connection, name, from_s))]
    steps += [(row.at_s, row.used_bytes_s) for row in [*reversed(before), *after] if row.at_s > from_s]
    ends = [at_s for at_s, _ in steps[1:]] + [until_s]
    full = _full(zip(steps, ends, strict=True), capacity - rate_bytes_s)
    return gaps(full, (from_s, until_s))


def _full(steps: Iterable[tuple[tuple[int, int], int]], room: int) -> Iterable[Times]:
    for (at_s, used), until_s in steps:
        if used > room:
            yield (at_s, until_s)


def _raise(connection: Connection, name: str, times: Times, by: int) -> None:
    begins_s, ends_s = times
    for at_s in times:
        before = _at(connection, name, at_s)
        connection.execute(_STEP, {"link": name, "at_s": at_s, "used_bytes_s": before})
    connection.execute(_RAISE, {"name": name, "begins_s": begins_s, "ends_s": ends_s, "by": by})
    # Only the two ends can have become steps that are none.
    for at_s in times:
        if _at(connection, name, at_s) == _at(connection, name, at_s - 1):
            connection.execute(delete(level).where(level.c.link == name, level.c.at_s == at_s))


def _at(connection: Connection, name: str, at_s: int) -> int:
    """What is promised at a moment."""
    return connection.execute(_AT, {"name": name, "at_s": at_s}).scalar() or 0

"""Things only one hold can have at a time: nodes, granules of addresses, segments. Over time, in table
``claim``.

The claims of one unit never overlap (the schema sees to it), so whether it is free in a window is told by
one row: the claim that begins last before the window's end. All that is asked here is one such look-up for
each unit asked about, however many reservations there are.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Sequence
from typing import Final

from sqlalchemy import Connection, insert, text

from virtgrid.grid.coalloc.windows import Times, gaps
from virtgrid.grid.messages.coalloc import LONGEST_PREFIX, Window
from virtgrid.grid.store.schema import claim

NODE, RANGE, SEGMENT = "node", "range", "segment"
_CLAIMS: Final = 2000
"""Of one kind, looked at before and after a time to find a nearest window; beyond them nobody looks."""

_FREE: Final = text("""
    SELECT value FROM json_each(:units) WHERE coalesce(
        (SELECT ends_at_s FROM claim WHERE kind = :kind AND unit = value AND begins_at_s < :ends_at_s
         ORDER BY begins_at_s DESC LIMIT 1), 0) <= :begins_at_s
    LIMIT :want
""")

# The claims of a unit do not overlap: of those that begin before a horizon only the last can reach into it.
_BUSY: Final = text("""
    SELECT value AS unit, begins_at_s, ends_at_s
    FROM json_each(:units) JOIN claim ON kind = :kind AND unit = value
    WHERE begins_at_s < :until_s AND begins_at_s >= coalesce(
        (SELECT begins_at_s FROM claim WHERE kind = :kind AND unit = value AND begins_at_s < :from_s
         ORDER BY begins_at_s DESC LIMIT 1), 0)
    ORDER BY value, begins_at_s
""")
_BEFORE: Final = text("""
    SELECT begins_at_s FROM claim WHERE kind = :kind AND begins_at_s < :near_s
    ORDER BY begins_at_s DESC LIMIT 1 OFFSET :claims
""")
_AFTER: Final = text("""
    SELECT begins_at_s FROM claim WHERE kind = :kind AND begins_at_s >= :near_s
    ORDER BY begins_at_s LIMIT 1 OFFSET :claims
""")
_CLAIM: Final = insert(claim)


def free(
    connection: Connection, kind: str, units: Sequence[str], window: Window, *, want: int | None = None
) -> list[str]:
    """Those of the units that nobody has at any moment of the window, in their order; at most ``want``."""
    rows = connection.execute(
        _FREE,
        {
            "kind": kind,
            "units": json.dumps(units),
            "begins_at_s": window.begins_at_s,
            "ends_at_s": window.ends_at_s,
            "want": len(units) if want is None else want,
        },
    )
    return list(rows.scalars())


def take(connection: Connection, hold: str, kind: str, units: Iterable[str], window: Window) -> None:
    """Write down that a hold has them. Errors: IntegrityError when one of them is taken."""
    rows = [claim_row(hold, kind, unit, window) for unit in units]
    connection.execute(_CLAIM, rows)


def claim_row(hold: str, kind: str, unit: str, window: Window) -> dict[str, object]:
    """One claim, as its columns."""
    return {
        "kind": kind,
        "unit": unit,
        "begins_at_s": window.begins_at_s,
        "ends_at_s": window.ends_at_s,
        "hold": hold,
    }


def timetable(
    connection: Connection, kind: str, units: Sequence[str], near_s: int, within: Times
) -> list[list[Times]]:
    """Of each unit the times it is free, around a time: within a horizon, or as far as ``_CLAIMS`` reach."""
    from_s, until_s = _reach(connection, kind, near_s, within)
    busy: dict[str, list[Times]] = {unit: [] for unit in units}
    times = {"kind": kind, "units": json.dumps(units), "from_s": from_s, "until_s": until_s}
    for unit, begins_s, ends_s in connection.execute(_BUSY, times):
        busy[unit].append((begins_s, ends_s))
    return [gaps(taken, (from_s, until_s)) for taken in busy.values()]


def _reach(connection: Connection, kind: str, near_s: int, within: Times) -> Times:
    """The horizon, shortened to where so many claims lie on each side of a time."""
    at = {"kind": kind, "near_s": near_s, "claims": _CLAIMS}
    before = connection.execute(_BEFORE, at).scalar() or 0
    after = connection.execute(_AFTER, at).scalar() or within[1]
    return min(max(within[0], before), near_s), max(min(within[1], after), near_s)


def granules(range_: str) -> list[str]:
    """The units a range of addresses is made of: networks of the longest prefix, by their first address."""
    parts = ipaddress.IPv4Network(range_).subnets(new_prefix=LONGEST_PREFIX)
    return [str(part.network_address) for part in parts]

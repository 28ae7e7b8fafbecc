"""Whether a store promises anything twice, or keeps anything for nobody: reckoned from the holds themselves.

Nothing here trusts the tables that are to prevent it: what a hold was granted is compared with what every
other was.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Iterator

from sqlalchemy import select

from virtgrid.grid.coalloc.provider import TABLE
from virtgrid.grid.messages.coalloc import LONGEST_PREFIX, Grant
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.schema import claim, flow, hold, link

Times = tuple[int, int, str]
"""From, until, and the key of the hold."""


def audit(database: Database) -> list[str]:
    """Contradictions, one sentence each; none is what is wanted."""
    keeps = [state for state, row in TABLE.items() if row.keeps]
    with database.read() as connection:
        rows = connection.execute(select(hold).where(hold.c.state.in_(keeps))).all()
        flows = connection.execute(
            select(flow.c.link, flow.c.rate_bytes_s, hold.c.begins_at_s, hold.c.ends_at_s).join(hold)
        ).all()
        capacities = connection.execute(select(link.c.name, link.c.capacity_bytes_s)).all()
        gone = select(claim.c.hold).join(hold).where(hold.c.state.not_in(keeps)).distinct()
        orphans = connection.execute(gone).scalars().all()
    by_unit: defaultdict[str, list[Times]] = defaultdict(list)
    for row in rows:
        for unit in _units(Grant.model_validate_json(row.grant)):
            by_unit[unit].append((row.begins_at_s, row.ends_at_s, row.key))
    found = [problem for unit, times in by_unit.items() for problem in _twice(unit, times)]
    for name, capacity in capacities:
        changes = [
            change
            for row in flows
            if row.link == name
            for change in ((row.begins_at_s, row.rate_bytes_s), (row.ends_at_s, -row.rate_bytes_s))
        ]
        used = most = 0
        for _, by in sorted(changes):
            used += by
            most = max(most, used)
        if most > capacity:
            found.append(f"{most} bytes/s of {name} are promised, which has {capacity}")
    return found + [f"hold {key} keeps something and is gone" for key in orphans]


def _units(grant: Grant) -> Iterator[str]:
    yield from grant.nodes
    if grant.addresses is not None:
        for part in ipaddress.IPv4Network(grant.addresses).subnets(new_prefix=LONGEST_PREFIX):
            yield str(part)
    if grant.segment is not None:
        yield f"segment {grant.segment}"


def _twice(unit: str, times: Iterable[Times]) -> Iterator[str]:
    before: Times | None = None
    for now in sorted(times):
        if before is not None and now[0] < before[1]:
            yield f"{unit} is promised to {before[2]} and to {now[2]} at {now[0]}"
        if before is None or now[1] > before[1]:
            before = now

"""Many holds written down at once, into an empty store: how it is known what a full one costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from sqlalchemy import insert

from virtgrid.grid.coalloc.provider import Record
from virtgrid.grid.store import units
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.promises import row_of
from virtgrid.grid.store.schema import claim, flow, hold, level

T = TypeVar("T")

_AT_ONCE: Final = 2000


def fill(database: Database, records: Sequence[Record], *, flows: Mapping[str, int]) -> None:
    """Holds with what their grants say, and of each link so many bytes per second for each of them.

    Errors: IntegrityError when two of them would have the same, as for any other hold.
    """
    with database.write() as connection:
        for some in _batches(records):
            connection.execute(insert(hold), [row_of(record) for record in some])
            connection.execute(insert(claim), list(_claims(some)))
            if flows:
                connection.execute(
                    insert(flow),
                    [
                        {"hold": record.key, "link": name, "rate_bytes_s": rate}
                        for record in some
                        for name, rate in flows.items()
                    ],
                )
        for name, rate in flows.items():
            for steps in _batches(list(_steps(records, rate))):
                connection.execute(
                    insert(level),
                    [{"link": name, "at_s": at_s, "used_bytes_s": used} for at_s, used in steps],
                )


def _batches(things: Sequence[T]) -> Iterator[Sequence[T]]:
    for at in range(0, len(things), _AT_ONCE):
        yield things[at : at + _AT_ONCE]


def _claims(records: Iterable[Record]) -> Iterator[dict[str, object]]:
    for record in records:
        grant = record.grant
        ranges = units.granules(grant.addresses) if grant.addresses else []
        segments = [] if grant.segment is None else [str(grant.segment)]
        for kind, some in ((units.NODE, grant.nodes), (units.RANGE, ranges), (units.SEGMENT, segments)):
            for unit in some:
                yield units.claim_row(record.key, kind, unit, record.window)


def _steps(records: Iterable[Record], rate: int) -> Iterator[tuple[int, int]]:
    changes: defaultdict[int, int] = defaultdict(int)
    for record in records:
        changes[record.window.begins_at_s] += rate
        changes[record.window.ends_at_s] -= rate
    used = 0
    for at_s in sorted(changes):
        used += changes[at_s]
        yield at_s, used

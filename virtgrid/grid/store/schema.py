"""The tables. The revisions below ``revisions/`` make them; a test holds both to be the same."""

from __future__ import annotations

from typing import Final

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, Integer, MetaData, Table, Text

metadata: Final = MetaData()

#: Holds, by their key (``virtgrid.grid.coalloc.provider.Record``). grant: JSON.
hold: Final = Table(
    "hold",
    metadata,
    Column("key", Text, primary_key=True),
    Column("print", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("reservation", Text, nullable=False),
    Column("begins_at_s", Integer, nullable=False),
    Column("ends_at_s", Integer, nullable=False),
    Column("expires_at_s", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("grant", Text, nullable=False),
    Column("gone_at_s", Integer),
    CheckConstraint("begins_at_s < ends_at_s", name="forward"),
    Index("hold_expiry", "state", "expires_at_s"),
    Index("hold_end", "state", "ends_at_s"),
    Index("hold_gone", "gone_at_s"),
)

#: Who has which unit when. kind: node, range, segment. The times of one unit never overlap: a trigger of
#: the first revision refuses it, whatever a program does. So the one claim that begins last before a time
#: tells whether the unit is free.
claim: Final = Table(
    "claim",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("unit", Text, primary_key=True),
    Column("begins_at_s", Integer, primary_key=True),
    Column("ends_at_s", Integer, nullable=False),
    Column("hold", Text, ForeignKey("hold.key"), nullable=False),
    CheckConstraint("begins_at_s < ends_at_s", name="forward"),
    Index("claim_hold", "hold"),
    Index("claim_time", "kind", "begins_at_s"),
    sqlite_with_rowid=False,
)

#: Links, each way the same.
link: Final = Table(
    "link",
    metadata,
    Column("name", Text, primary_key=True),
    Column("capacity_bytes_s", Integer, nullable=False),
    CheckConstraint("capacity_bytes_s > 0", name="some"),
)

#: How much of a link is promised from a time until the next row. Never raised above the capacity: a trigger.
level: Final = Table(
    "level",
    metadata,
    Column("link", Text, ForeignKey("link.name"), primary_key=True),
    Column("at_s", Integer, primary_key=True),
    Column("used_bytes_s", Integer, nullable=False),
    CheckConstraint("used_bytes_s >= 0", name="positive"),
    sqlite_with_rowid=False,
)

#: What a hold adds to the levels of a link during its window.
flow: Final = Table(
    "flow",
    metadata,
    Column("hold", Text, ForeignKey("hold.key"), primary_key=True),
    Column("link", Text, ForeignKey("link.name"), primary_key=True),
    Column("rate_bytes_s", Integer, nullable=False),
    CheckConstraint("rate_bytes_s > 0", name="some"),
    sqlite_with_rowid=False,
)

#: A coordinator's reservations. wish: the user's words, parties: what is known of each, both JSON.
reservation: Final = Table(
    "reservation",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("ends_at_s", Integer, nullable=False),
    Column("wish", Text, nullable=False),
    Column("parties", Text, nullable=False),
    Index("reservation_state", "state", "ends_at_s"),
)

#: A coordinator's jobs; the id is their reservation's. record: JSON (``virtgrid.grid.store.jobs``).
job: Final = Table(
    "job",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("ends_at_s", Integer, nullable=False),
    Column("record", Text, nullable=False),
    Index("job_state", "state", "ends_at_s"),
)

#: A site's crews, by the key of their hold. record: JSON (``virtgrid.grid.store.crews``).
crew: Final = Table(
    "crew",
    metadata,
    Column("hold", Text, primary_key=True),
    Column("record", Text, nullable=False),
)

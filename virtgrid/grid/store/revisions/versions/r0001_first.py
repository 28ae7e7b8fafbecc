"""Holds, claims, levels and reservations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_TRIGGERS = (
    """
    CREATE TRIGGER claim_never_overlaps BEFORE INSERT ON claim
    WHEN coalesce((SELECT ends_at_s FROM claim WHERE kind = NEW.kind AND unit = NEW.unit
                   AND begins_at_s < NEW.ends_at_s ORDER BY begins_at_s DESC LIMIT 1), 0) > NEW.begins_at_s
    BEGIN SELECT raise(ABORT, 'two holds would have the same unit at a time'); END
    """,
    """
    CREATE TRIGGER claim_never_moves BEFORE UPDATE ON claim
    BEGIN SELECT raise(ABORT, 'a claim is made and removed, never changed'); END
    """,
    """
    CREATE TRIGGER level_never_exceeds BEFORE UPDATE ON level
    WHEN NEW.used_bytes_s > OLD.used_bytes_s
     AND NEW.used_bytes_s > (SELECT capacity_bytes_s FROM link WHERE name = NEW.link)
    BEGIN SELECT raise(ABORT, 'more would be promised than the link has'); END
    """,
)


def upgrade() -> None:
    op.create_table(
        "hold",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("print", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("reservation", sa.Text, nullable=False),
        sa.Column("begins_at_s", sa.Integer, nullable=False),
        sa.Column("ends_at_s", sa.Integer, nullable=False),
        sa.Column("expires_at_s", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("grant", sa.Text, nullable=False),
        sa.Column("gone_at_s", sa.Integer),
        sa.CheckConstraint("begins_at_s < ends_at_s", name="forward"),
    )
    op.create_index("hold_expiry", "hold", ["state", "expires_at_s"])
    op.create_index("hold_end", "hold", ["state", "ends_at_s"])
    op.create_index("hold_gone", "hold", ["gone_at_s"])
    op.create_table(
        "claim",
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("unit", sa.Text, primary_key=True),
        sa.Column("begins_at_s", sa.Integer, primary_key=True),
        sa.Column("ends_at_s", sa.Integer, nullable=False),
        sa.Column("hold", sa.Text, sa.ForeignKey("hold.key"), nullable=False),
        sa.CheckConstraint("begins_at_s < ends_at_s", name="forward"),
        sqlite_with_rowid=False,
    )
    op.create_index("claim_hold", "claim", ["hold"])
    op.create_index("claim_time", "claim", ["kind", "begins_at_s"])
    op.create_table(
        "link",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("capacity_bytes_s", sa.Integer, nullable=False),
        sa.CheckConstraint("capacity_bytes_s > 0", name="some"),
    )
    op.create_table(
        "level",
        sa.Column("link", sa.Text, sa.ForeignKey("link.name"), primary_key=True),
        sa.Column("at_s", sa.Integer, primary_key=True),
        sa.Column("used_bytes_s", sa.Integer, nullable=False),
        sa.CheckConstraint("used_bytes_s >= 0", name="positive"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "flow",
        sa.Column("hold", sa.Text, sa.ForeignKey("hold.key"), primary_key=True),
        sa.Column("link", sa.Text, sa.ForeignKey("link.name"), primary_key=True),
        sa.Column("rate_bytes_s", sa.Integer, nullable=False),
        sa.CheckConstraint("rate_bytes_s > 0", name="some"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "reservation",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("ends_at_s", sa.Integer, nullable=False),
        sa.Column("wish", sa.Text, nullable=False),
        sa.Column("parties", sa.Text, nullable=False),
    )
    op.create_index("reservation_state", "reservation", ["state", "ends_at_s"])
    for trigger in _TRIGGERS:
        op.execute(trigger)

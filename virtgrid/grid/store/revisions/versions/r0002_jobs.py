"""Jobs of a coordinator and crews of a site."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("ends_at_s", sa.Integer, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
    )
    op.create_index("job_state", "job", ["state", "ends_at_s"])
    op.create_table(
        "crew",
        sa.Column("hold", sa.Text, primary_key=True),
        sa.Column("record", sa.Text, nullable=False),
    )

"""Alembic's entry: bring the database behind the given connection up to date."""

from __future__ import annotations

from alembic import context

from virtgrid.grid.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    # Alembic does not believe it of SQLite; within a BEGIN that is said aloud it is so.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()

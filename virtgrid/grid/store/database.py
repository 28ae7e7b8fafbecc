"""A SQLite file with the grid's tables: opening it, bringing its schema up to date, and transactions.

Write-ahead log, and ``synchronous=FULL``: what a transaction wrote is on the disk when it ends, and a kill
at any moment leaves the last one that ended. A writing transaction is IMMEDIATE: it waits for its turn
*before* it reads, so what it decides on what it read is still so when it writes, in whichever process the
others run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError

from virtgrid.core.errors import DeadlineError, RefusedError

BUSY_S: Final = 10.0
"""How long a transaction waits for its turn."""
_REVISIONS: Final = Path(__file__).with_name("revisions")


class Database:
    """One file. A context manager; its methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Open, make or upgrade. Errors: RefusedError (no database of ours, a newer one, no rights)."""
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise RefusedError(f"{path} cannot be used", cause=error.strerror) from error
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_S})
        event.listen(self._engine, "connect", _connected)
        event.listen(self._engine, "begin", _begun)
        try:
            with self.write() as connection:
                config = Config()
                config.set_main_option("script_location", str(_REVISIONS).replace("%", "%%"))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except CommandError as error:
            self._engine.dispose()
            raise RefusedError(
                f"{path} was written by another version of virtgrid", cause=str(error)
            ) from error
        except DatabaseError as error:
            self._engine.dispose()
            raise RefusedError(f"{path} is no database of virtgrid", cause=str(error.orig)) from error

    @contextlib.contextmanager
    def write(self, *, lasting: bool = True) -> Iterator[Connection]:
        """A transaction that may write, alone at a time; undone by any exception. Errors: DeadlineError.

        lasting: on the disk when it ends. Otherwise a power failure may forget it, but no kill, and only with
        everything that came after it.
        """
        level = "FULL" if lasting else "NORMAL"
        with self._engine.connect().execution_options(virtgrid_write=level) as connection:
            try:
                transaction = connection.begin()
            except OperationalError as error:
                raise DeadlineError(
                    f"{self.path} was busy for {BUSY_S:g} s", cause=str(error.orig)
                ) from error
            with transaction:
                yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one moment and disturbs nobody."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def revision() -> str | None:
    """The newest revision of the schema."""
    return ScriptDirectory(str(_REVISIONS)).get_current_head()


def _connected(connection: Any, _record: object) -> None:
    # The driver's own idea of when a transaction begins is switched off; _begun says it.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begun(connection: Connection) -> None:
    level = connection.get_execution_options().get("virtgrid_write")
    if level is None:
        connection.exec_driver_sql("BEGIN")
        return
    connection.exec_driver_sql(f"PRAGMA synchronous={level}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")

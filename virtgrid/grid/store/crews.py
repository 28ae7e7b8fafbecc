"""The crews of a site: what a coordinator said they are to become, and who is in them.

How far they are is not here: pilots say it when they dial in.
"""

from __future__ import annotations

from sqlalchemy import delete, insert, select, update

from virtgrid.grid.coalloc.crew import Goal
from virtgrid.grid.messages.coalloc import Window
from virtgrid.grid.messages.common import HostName, Ipv4, Key, Model, Name
from virtgrid.grid.messages.job import Muster
from virtgrid.grid.messages.node import Exec, HostEntry
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.schema import crew


class Member(Model):
    """One node of a crew. ticket: the id of its pilot's."""

    node: HostName
    sandbox: HostName
    address: Ipv4
    ticket: Key


class CrewRecord(Model):
    """muster, hosts, program: as they were said; None: not yet. account: of the site, that its pilots run as.

    gone: nothing of it is left. used_s: node-seconds, once it is gone.
    """

    muster: Muster
    owner: str
    reservation: Name
    account: str
    window: Window
    members: tuple[Member, ...]
    goal: Goal = Goal.READY
    hosts: tuple[HostEntry, ...] | None = None
    program: Exec | None = None
    gone: bool = False
    used_s: float = 0.0

    @property
    def hold(self) -> str:
        return self.muster.key


class Crews:
    """The table. Its methods may be called from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[CrewRecord]:
        with self._database.read() as connection:
            rows = connection.execute(select(crew.c.record)).scalars().all()
        return [CrewRecord.model_validate_json(row) for row in rows]

    def save(self, record: CrewRecord) -> None:
        """On the disk when this returns."""
        text = record.model_dump_json()
        with self._database.write() as connection:
            changed = connection.execute(update(crew).where(crew.c.hold == record.hold).values(record=text))
            if not changed.rowcount:
                connection.execute(insert(crew).values(hold=record.hold, record=text))

    def remove(self, hold: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(crew).where(crew.c.hold == hold))

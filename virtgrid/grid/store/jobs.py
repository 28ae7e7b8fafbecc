"""A coordinator's jobs: what it decided of them is here before any site is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.grid.coalloc.job import Crew, Job
from virtgrid.grid.messages.coalloc import Reserve
from virtgrid.grid.messages.common import Model
from virtgrid.grid.messages.job import JobState, JobView, Verdict
from virtgrid.grid.messages.node import Exec, Usage
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.reservations import KEEP_S, LIST_LIMIT
from virtgrid.grid.store.schema import job


class _Record(Model):
    """What of a job is not a column."""

    wish: Reserve
    program: Exec
    user: str
    submitted_at_s: int
    reason: str
    verdict: Verdict | None
    ended: bool
    status: int | None
    usage: Usage | None
    used_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptJob:
    """A job with its owner and what was asked. user: the owner's name, and the one inside the sandboxes.

    used_s: node-seconds, of crews that are gone.
    """

    wish: Reserve
    program: Exec
    owner: str
    user: str
    submitted_at_s: int
    now: Job
    used_s: float = 0.0

    @property
    def id(self) -> str:
        return self.wish.id

    def moved(self, now: Job) -> KeptJob:
        """The same after a step."""
        used_s = sum(crew.used_s for crew in now.sites.values())
        return replace(self, now=now, used_s=max(self.used_s, used_s))

    def view(self) -> JobView:
        """For its user."""
        return JobView(
            id=self.id,
            state=self.now.state,
            verdict=self.now.verdict,
            reason=self.now.reason,
            status=self.now.status,
            usage=self.now.usage,
            used_s=round(self.used_s, 3),
            window=self.wish.window,
            submitted_at_s=self.submitted_at_s,
            sites=tuple(self.now.sites),
            nodes=sum(site.nodes for site in self.wish.sites),
            argv=self.program.argv,
        )


class JobTable:
    """The table. Its methods may be called from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, new: KeptJob) -> None:
        """Write down a new one. Errors: RefusedError when there is one of that id."""
        with self._database.write() as connection:
            known = connection.execute(select(job.c.id).where(job.c.id == new.id))
            if known.one_or_none() is not None:
                raise RefusedError(f"there is a job {new.id} already")
            connection.execute(insert(job).values(**_columns(new)))

    def write(self, kept: KeptJob) -> None:
        """Write down how it stands; on the disk when this returns."""
        with self._database.write() as connection:
            connection.execute(update(job).where(job.c.id == kept.id).values(**_columns(kept)))

    def find(self, id_: str) -> KeptJob:
        """Errors: NotFoundError."""
        with self._database.read() as connection:
            row = connection.execute(select(job).where(job.c.id == id_)).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no job {id_}", hint="virtgrid job list")
        return _kept(row)

    def after(self, id_: str, *, owner: str | None, limit: int = LIST_LIMIT) -> list[KeptJob]:
        """The next ones in the order of ids. owner None: everybody's."""
        chosen = select(job).where(job.c.id > id_)
        if owner is not None:
            chosen = chosen.where(job.c.owner == owner)
        with self._database.read() as connection:
            rows = connection.execute(chosen.order_by(job.c.id).limit(limit)).all()
        return [_kept(row) for row in rows]

    def under_way(self, owner: str | None = None) -> list[str]:
        """The ids of those that are not over. owner None: everybody's."""
        chosen = select(job.c.id).where(job.c.state != JobState.OVER)
        if owner is not None:
            chosen = chosen.where(job.c.owner == owner)
        with self._database.read() as connection:
            return list(connection.execute(chosen).scalars())

    def forget(self, now_s: int) -> list[str]:
        """Those that nobody asks for any more are removed; returns their ids."""
        old = (job.c.state == JobState.OVER) & (job.c.ends_at_s <= now_s - KEEP_S)
        with self._database.write() as connection:
            ids = list(connection.execute(select(job.c.id).where(old)).scalars())
            connection.execute(delete(job).where(job.c.id.in_(ids)))
        return ids


def _columns(kept: KeptJob) -> dict[str, Any]:
    record = _Record(
        wish=kept.wish,
        program=kept.program,
        user=kept.user,
        submitted_at_s=kept.submitted_at_s,
        reason=kept.now.reason,
        verdict=kept.now.verdict,
        ended=kept.now.ended,
        status=kept.now.status,
        usage=kept.now.usage,
        used_s=kept.used_s,
    )
    return {
        "id": kept.id,
        "owner": kept.owner,
        "state": kept.now.state,
        "ends_at_s": kept.wish.window.ends_at_s,
        "record": record.model_dump_json(),
    }


def _kept(row: Row[Any]) -> KeptJob:
    record = _Record.model_validate_json(row.record)
    now = Job(
        state=JobState(row.state),
        reason=record.reason,
        sites={site.site: Crew() for site in record.wish.sites},
        verdict=record.verdict,
        ended=record.ended,
        status=record.status,
        usage=record.usage,
    )
    return KeptJob(
        wish=record.wish,
        program=record.program,
        owner=row.owner,
        user=record.user,
        submitted_at_s=record.submitted_at_s,
        now=now,
        used_s=record.used_s,
    )

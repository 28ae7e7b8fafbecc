"""What the REST interface says; its description is made from these (``openapi.py``). Pure.

Times that end in ``_at`` are UTC in ISO 8601, durations seconds, sizes bytes, rates bytes per second.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from virtgrid.grid.messages.coalloc import Line
from virtgrid.grid.messages.job import JobView
from virtgrid.report.model import Outcome, State, Status
from virtgrid.report.objects import as_object

#: Of a guest with thousands of connections the page shows those that have kept it waiting longest.
BUSY_MAX: Final = 20


class Answer(BaseModel):
    """Anything that is said."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Waiting(Answer):
    """For whom a held migration waits. allowed: unsuitable connections the policy puts up with now."""

    text: str
    reason: str | None
    suitable: int | None
    total: int | None
    allowed: int | None
    hold_s: float | None
    hold_max_s: float | None
    then: str | None


class GuestName(Answer):
    """The name clients find the guest by, and where it stands."""

    name: str
    state: str


class Progress(Answer):
    """How far the copy is. storage, first_pass: shares from 0 to 1, which only grow."""

    storage: float | None
    first_pass: float | None
    remaining_bytes: int | None
    sent_bytes: int | None
    dirty_bytes_s: float | None
    speed_bytes_s: float | None


class Connections(Answer):
    """The guest's connections by verdict; unknown ones count as unsuitable."""

    total: int
    suitable: int
    unsuitable: int
    unknown: int


class Phase(Answer):
    """A part of a migration; end_s is null while it lasts. broken: it ended badly there."""

    phase: str
    start_s: float
    end_s: float | None
    broken: bool


class Busy(Answer):
    """A connection that speaks against stopping the guest now."""

    client: str
    server: str
    protocol: str
    verdict: str
    reason: str
    for_s: float


class Migration(Answer):
    """A migration as it stands; ended ones keep what they ended with."""

    id: str
    domain: str
    source: str
    destination: str
    policy: str
    state: State
    outcome: Outcome
    for_s: float | None
    waiting_for: Waiting | None
    on: str | None
    started_at: datetime | None
    hold: str | None
    total_s: float | None
    held_s: float | None
    downtime_s: float | None
    answering: str | None
    name: GuestName | None
    unsuitable_at_pause: int | None
    sent_bytes: int | None
    exit_status: int | None
    error: str | None
    what: str | None
    cause: str | None
    hint: str | None
    verdict: str
    progress: Progress
    connections: Connections | None
    phases: tuple[Phase, ...]
    busy: tuple[Busy, ...]


class Unreadable(Answer):
    """A journal that cannot be read, and why."""

    journal: str
    why: str


class Migrations(Answer):
    """Newest first. more: there are older ones than were asked for."""

    migrations: tuple[Migration, ...]
    unreadable: tuple[Unreadable, ...]
    more: bool


class Jobs(Answer):
    """The coordinator's jobs. why: it could not be asked."""

    jobs: tuple[JobView, ...]
    why: str | None


class Reservations(Answer):
    """The coordinator's reservations. why: it could not be asked."""

    reservations: tuple[Line, ...]
    why: str | None


class Host(Answer):
    """Whom one has asked, and as whom. may_steer: whether the caller may release and abort."""

    host: str
    version: str
    who: str
    may_steer: bool
    grid: bool
    now_at: datetime


class Steer(Answer):
    """What is asked of a running migration. by: written into its journal, beside who asked."""

    by: Annotated[str, Field(max_length=100)] = ""


class Steered(Answer):
    """The migration's driver has heard it."""

    ok: bool
    text: str


class Problem(Answer):
    """What went wrong (RFC 9457). type: the class of error; hint: what may help."""

    type: str
    title: str
    status: int
    detail: str | None
    hint: str | None


def migration(status: Status, path: Path, now: datetime) -> Migration:
    """A migration as it is said."""
    said: dict[str, Any] = as_object(status, path, now)
    del said["journal"]  # the name of a file is nobody's business elsewhere
    ram, counts = status.ram, status.counts
    elapsed_s = status.last_s
    if status.outcome is Outcome.RUNNING and status.started_at is not None:
        elapsed_s = max(elapsed_s, (now - status.started_at).total_seconds())
    return Migration.model_validate(
        {
            **said,
            "progress": Progress(
                storage=status.storage_fraction,
                first_pass=status.first_pass,
                remaining_bytes=None if ram is None else ram.remaining_bytes,
                sent_bytes=None if ram is None else ram.sent_bytes,
                dirty_bytes_s=None if ram is None else ram.dirty_bytes_s,
                speed_bytes_s=None if ram is None else ram.speed_bytes_s,
            ),
            "connections": None
            if counts is None
            else Connections(
                total=counts.total,
                suitable=counts.suitable,
                unsuitable=counts.unsuitable,
                unknown=counts.unknown,
            ),
            "phases": [
                Phase(phase=span.name, start_s=span.start_s, end_s=span.end_s, broken=span.broken)
                for span in status.phases
            ],
            "busy": [
                Busy(
                    client=one.client,
                    server=one.server,
                    protocol=one.protocol,
                    verdict=one.verdict,
                    reason=one.reason,
                    for_s=max(0.0, elapsed_s - one.since_s),
                )
                for one in (status.unsuitable if status.outcome is Outcome.RUNNING else ())[:BUSY_MAX]
            ],
        }
    )

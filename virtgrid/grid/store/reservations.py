"""A coordinator's reservations: what it decided is here before anybody is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Row, delete, insert, select, text, update

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.grid.coalloc.coordinator import TABLE, Coordination, Party
from virtgrid.grid.messages.coalloc import (
    Grant,
    Hold,
    PartyState,
    PartyView,
    ReservationState,
    Reserve,
    View,
    Window,
)
from virtgrid.grid.messages.common import Model
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.schema import reservation

LIST_LIMIT: Final = 500
KEEP_S: Final = 30 * 86400
"""How long a reservation can be looked at after its window."""
KEEP_OF_ONE: Final = 10_000
"""Reservations of one user that can be looked at when nothing of them stands any more: one who asks for what
nobody has, for a window in a thousand years, does not fill the disk.
"""
_LASTING: Final = (ReservationState.COMMITTING, ReservationState.RELEASING)
"""What must be on the disk before it is acted upon. A power failure that forgets a new reservation, or the
end of one, leaves it undecided, or decided: the parties are asked again.
"""
_UNSETTLED: Final = [state for state, row in TABLE.items() if row.events]


_SETTLED: Final = ", ".join(f"'{state}'" for state, row in TABLE.items() if not row.events)
_FORGET_BEYOND: Final = text(f"""
    DELETE FROM reservation WHERE rowid IN (
        SELECT row FROM (
            SELECT rowid AS row, row_number() OVER (PARTITION BY owner ORDER BY rowid DESC) AS number
            FROM reservation WHERE state IN ({_SETTLED}))
        WHERE number > :of_one)
""")  # noqa: S608 - our own words


class Kept(Model):
    """What is known of one party. hold: as it was said; None: it could not be asked, why says it."""

    hold: Hold | None
    state: PartyState = PartyState.ASKED
    why: str = ""
    grant: Grant | None = None
    nearest: tuple[Window, ...] = ()


class KeptParties(Model):
    """parties: by name. nearest: windows in which all could."""

    parties: dict[str, Kept]
    nearest: tuple[Window, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A reservation with everything its coordinator knows."""

    wish: Reserve
    owner: str
    state: ReservationState
    reason: str
    kept: KeptParties

    @property
    def coordination(self) -> Coordination:
        parties = {name: Party(state=one.state, why=one.why) for name, one in self.kept.parties.items()}
        return Coordination(state=self.state, reason=self.reason, parties=parties)

    def moved(self, now: Coordination) -> Reservation:
        """The same after a step."""
        parties = {
            name: one.model_copy(update={"state": now.parties[name].state, "why": now.parties[name].why})
            for name, one in self.kept.parties.items()
        }
        kept = self.kept.model_copy(update={"parties": parties})
        return replace(self, state=now.state, reason=now.reason, kept=kept)

    def told(self, party: str, **what: Any) -> Reservation:
        """The same with what a party told besides: grant, nearest."""
        parties = {**self.kept.parties, party: self.kept.parties[party].model_copy(update=what)}
        return replace(self, kept=self.kept.model_copy(update={"parties": parties}))

    def view(self) -> View:
        """For its user."""
        return View(
            id=self.wish.id,
            state=self.state,
            reason=self.reason,
            window=self.wish.window,
            parties=tuple(
                PartyView(
                    party=name,
                    state=one.state,
                    wanted=None if one.hold is None else one.hold.wanted,
                    why=one.why,
                    nearest=one.nearest,
                    grant=one.grant,
                )
                for name, one in self.kept.parties.items()
            ),
            nearest=self.kept.nearest,
        )


class Reservations:
    """The table. Its methods may be called from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, new: Reservation) -> None:
        """Write down a new one. Errors: RefusedError when there is one of that id."""
        with self._database.write(lasting=False) as connection:
            known = connection.execute(select(reservation.c.id).where(reservation.c.id == new.wish.id))
            if known.one_or_none() is not None:
                raise RefusedError(f"there is a reservation {new.wish.id} already")
            connection.execute(insert(reservation).values(**_columns(new)))

    def write(self, now: Reservation) -> None:
        """Write down how it stands; a decision is on the disk when this returns."""
        with self._database.write(lasting=now.state in _LASTING) as connection:
            connection.execute(
                update(reservation).where(reservation.c.id == now.wish.id).values(**_columns(now))
            )

    def find(self, id_: str) -> Reservation:
        """Errors: NotFoundError."""
        with self._database.read() as connection:
            row = connection.execute(select(reservation).where(reservation.c.id == id_)).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no reservation {id_}", hint="virtgrid reservation list")
        return _reservation(row)

    def after(self, id_: str, *, owner: str | None, limit: int = LIST_LIMIT) -> list[Reservation]:
        """The next ones in the order of ids. owner None: everybody's."""
        chosen = select(reservation).where(reservation.c.id > id_)
        if owner is not None:
            chosen = chosen.where(reservation.c.owner == owner)
        with self._database.read() as connection:
            rows = connection.execute(chosen.order_by(reservation.c.id).limit(limit)).all()
        return [_reservation(row) for row in rows]

    def under_way(self) -> list[str]:
        """The ids of those that still have somebody to ask."""
        asking = [state for state, row in TABLE.items() if row.asks is not None]
        with self._database.read() as connection:
            chosen = select(reservation.c.id).where(reservation.c.state.in_(asking))
            return list(connection.execute(chosen).scalars())

    def open(self) -> list[tuple[str, Reserve]]:
        """Owner and words of all that may keep something."""
        chosen = select(reservation.c.owner, reservation.c.wish).where(reservation.c.state.in_(_UNSETTLED))
        with self._database.read() as connection:
            rows = connection.execute(chosen).all()
        return [(row.owner, Reserve.model_validate_json(row.wish)) for row in rows]

    def owners(self) -> list[str]:
        """Whoever has or had any."""
        with self._database.read() as connection:
            return list(connection.execute(select(reservation.c.owner).distinct()).scalars())

    def hand_over(self, before: str, after: str) -> None:
        """All of one owner's are another's: the same one, by another name."""
        with self._database.write() as connection:
            connection.execute(update(reservation).where(reservation.c.owner == before).values(owner=after))

    def ended(self, now_s: int, *, limit: int = 100) -> list[str]:
        """Those whose window has ended, and to which that still means something."""
        chosen = select(reservation.c.id).where(
            reservation.c.state.in_(_UNSETTLED), reservation.c.ends_at_s <= now_s
        )
        with self._database.read() as connection:
            return list(connection.execute(chosen.limit(limit)).scalars())

    def forget(self, now_s: int) -> None:
        """Those that nobody asks for any more."""
        old = (reservation.c.state.not_in(_UNSETTLED)) & (reservation.c.ends_at_s <= now_s - KEEP_S)
        with self._database.write() as connection:
            connection.execute(delete(reservation).where(old))

    def forget_beyond(self, of_one: int = KEEP_OF_ONE) -> None:
        """Of each user the oldest of those that mean nothing any more, beyond so many."""
        with self._database.write() as connection:
            connection.execute(_FORGET_BEYOND, {"of_one": of_one})


def _columns(one: Reservation) -> Mapping[str, Any]:
    return {
        "id": one.wish.id,
        "owner": one.owner,
        "state": one.state,
        "reason": one.reason,
        "ends_at_s": one.wish.window.ends_at_s,
        "wish": one.wish.model_dump_json(),
        "parties": one.kept.model_dump_json(),
    }


def _reservation(row: Row[Any]) -> Reservation:
    return Reservation(
        wish=Reserve.model_validate_json(row.wish),
        owner=row.owner,
        state=ReservationState(row.state),
        reason=row.reason,
        kept=KeptParties.model_validate_json(row.parties),
    )

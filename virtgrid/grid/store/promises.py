"""The holds of one provider: the table of ``coalloc.provider`` put into effect on its file.

Each command is one transaction: look, decide, write. What is taken, and by which hold, becomes true in the
same moment; a kill leaves either both or none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, Protocol

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, or_, select, text, update

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.grid.coalloc import provider, windows
from virtgrid.grid.coalloc.provider import TABLE, Record
from virtgrid.grid.coalloc.windows import Times
from virtgrid.grid.messages.coalloc import (
    AskFit,
    AskOffer,
    Command,
    Fit,
    Grant,
    Hold,
    HoldAnswer,
    HoldState,
    Offer,
    Refusal,
    Span,
    Standing,
    Wanted,
    Window,
)
from virtgrid.grid.store import levels
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.schema import claim, hold
from virtgrid.wire.answers import fingerprint

TENTATIVE_LIMIT: Final = 1024
"""Holds one coordinator may have open at a time: nobody can take everything without ever committing."""
_HORIZON_S: Final = 14 * 86400
_SWEEP_ROWS: Final = 200
"""Cleared away with one command at most, so that no command pays for a crowd's leftovers."""


# Made once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_FIND: Final = select(hold).where(hold.c.key == bindparam("key"))
_OPEN: Final = select(func.count()).where(
    hold.c.state == HoldState.HELD,
    hold.c.owner == bindparam("owner"),
    hold.c.expires_at_s > bindparam("now_s"),
)
_INSERT: Final = insert(hold)
_GRANTED: Final = update(hold).where(hold.c.key == bindparam("at_key")).values(grant=bindparam("grant"))
_ENDED: Final = (
    select(hold)
    .where(
        or_(
            (hold.c.state == HoldState.HELD) & (hold.c.expires_at_s <= bindparam("now_s")),
            hold.c.state.in_([HoldState.HELD, HoldState.COMMITTED])
            & (hold.c.ends_at_s <= bindparam("now_s")),
        )
    )
    .limit(_SWEEP_ROWS)
)
_FORGOTTEN: Final = select(hold.c.key).where(hold.c.gone_at_s <= bindparam("until_s")).limit(_SWEEP_ROWS)
# By way of the claims, of which few have begun; left to itself SQLite would look at all that is committed.
_AT_WORK: Final = text("""
    SELECT DISTINCT hold.* FROM claim CROSS JOIN hold ON hold.key = claim.hold
    WHERE claim.kind = :kind AND claim.begins_at_s <= :until_s
      AND hold.state = 'COMMITTED' AND hold.ends_at_s > :now_s
    ORDER BY hold.key
""")
_FREE_CLAIMS: Final = delete(claim).where(claim.c.hold == bindparam("at_key"))


class UnavailableError(RefusedError):
    """What was asked for cannot be had in this window; another one may do."""

    code = "VG-UNAVAILABLE"


class Stock(Protocol):
    """What a provider has to give. Called within a transaction."""

    def prepare(self, connection: Connection) -> None:
        """Write down what there is, before the first hold."""

    def check(self, wanted: Wanted) -> None:
        """Errors: RefusedError for what this provider never has."""

    def take(self, connection: Connection, asked: Hold) -> Grant:
        """Choose and write down (``units.take``, ``levels.add``). Errors: UnavailableError."""

    def begins(
        self, connection: Connection, wanted: Wanted, lasts_s: int, near_s: int, within: Times
    ) -> list[Span]:
        """The beginnings at which this could be had for so long, around a time."""

    def offer(self, connection: Connection, asked: AskOffer) -> Offer:
        """What is there. Errors: RefusedError when there are no nodes to offer."""


class Promises:
    """A provider's holds. party: its name, in refusals. Times are the caller's, seconds since the epoch."""

    def __init__(self, database: Database, party: str, stock: Stock) -> None:
        self._database, self.party, self._stock = database, party, stock

    def hold(self, asked: Hold, *, owner: str, now_s: int) -> HoldAnswer:
        """HOLD. Errors: RefusedError (clock, past, a used key, too many), nothing changed."""
        print_ = fingerprint(Command.HOLD, asked.model_dump(mode="json"))
        try:
            # A hold that a power failure forgets has lapsed: its COMMIT will be refused. No need to wait.
            with self._database.write(lasting=False) as connection:
                return HoldAnswer(standing=self._hold(connection, asked, print_, owner, now_s))
        except UnavailableError as error:
            wish = AskFit(near_s=asked.window.begins_at_s, lasts_s=asked.window.lasts_s, wanted=asked.wanted)
            spans = self._begins(wish, now_s)
            near = windows.nearest(spans, wish.near_s, wish.lasts_s)
            return HoldAnswer(refusal=Refusal(party=self.party, why=error.what[:500], nearest=near))

    def _hold(self, connection: Connection, asked: Hold, print_: str, owner: str, now_s: int) -> Standing:
        known = _find(connection, asked.key)
        if known is not None:
            provider.require_same(known, print_, owner)
            provider.after_command(known, Command.HOLD, now_s)
            return known.standing(now_s)
        provider.require_timely(asked, now_s)
        self._stock.check(asked.wanted)
        _sweep(connection, now_s)
        if (connection.execute(_OPEN, {"owner": owner, "now_s": now_s}).scalar() or 0) >= TENTATIVE_LIMIT:
            raise RefusedError(f"{owner} has {TENTATIVE_LIMIT} holds open", hint="commit or release some")
        record = Record(
            key=asked.key,
            print=print_,
            owner=owner,
            reservation=asked.reservation,
            window=asked.window,
            expires_at_s=now_s + asked.ttl_s,
            state=HoldState.HELD,
            grant=Grant(),
        )
        connection.execute(_INSERT, row_of(record))
        record = replace(record, grant=self._stock.take(connection, asked))
        connection.execute(_GRANTED, {"at_key": record.key, "grant": record.grant.model_dump_json()})
        return record.standing(now_s)

    def commit(self, key: str, *, owner: str, now_s: int) -> Standing:
        """COMMIT. Errors: RefusedError when it comes too late, NotFoundError when nobody knows the key."""
        with self._database.write() as connection:
            known = _known(connection, key, owner)
            after = replace(known, state=provider.after_command(known, Command.COMMIT, now_s))
            if after.state is not known.state:
                connection.execute(update(hold).where(hold.c.key == key).values(state=after.state))
            return after.standing(now_s)

    def release(self, key: str, *, owner: str, now_s: int) -> None:
        """RELEASE. A key nobody knows is done already."""
        with self._database.write() as connection:
            try:
                known = _known(connection, key, owner)
            except NotFoundError:
                return
            state = provider.after_command(known, Command.RELEASE, now_s)
            if TABLE[known.state].keeps:
                _let_go(connection, key, state, now_s)

    def status(self, key: str, *, owner: str, now_s: int) -> Standing:
        """STATUS. Errors: NotFoundError."""
        with self._database.read() as connection:
            return _known(connection, key, owner).standing(now_s)

    def keeps(self, key: str, *, now_s: int) -> bool:
        """Whether something is kept for a hold, whoever's it is."""
        with self._database.read() as connection:
            found = _find(connection, key)
        return found is not None and TABLE[provider.at(found, now_s)].keeps

    def fit(self, wish: AskFit, *, now_s: int) -> Fit:
        """FIT. Errors: RefusedError for what this provider never has."""
        self._stock.check(wish.wanted)
        return Fit(begins=windows.around(self._begins(wish, now_s), wish.near_s))

    def offer(self, asked: AskOffer) -> Offer:
        """OFFER."""
        with self._database.read() as connection:
            return self._stock.offer(connection, asked)

    def sweep(self, now_s: int) -> int:
        """Clear away what the clock has ended, some of it at a time; returns how much that was."""
        with self._database.write() as connection:
            return _sweep(connection, now_s)

    def standing(self, now_s: int) -> list[Standing]:
        """All that keep something now."""
        with self._database.read() as connection:
            states = [state for state, row in TABLE.items() if row.keeps]
            rows = connection.execute(select(hold).where(hold.c.state.in_(states))).all()
        records = [_record(row) for row in rows]
        return [one.standing(now_s) for one in records if TABLE[provider.at(one, now_s)].keeps]

    def committed(self, kind: str, *, until_s: int, now_s: int) -> list[Standing]:
        """Those that have units of a kind and are committed, and whose window is open at some time of now
        until then. Costs what there is of them, and not all there are: claims of the past are cleared away.
        """
        with self._database.read() as connection:
            times = {"kind": kind, "until_s": until_s, "now_s": now_s}
            records = [_record(row) for row in connection.execute(_AT_WORK, times)]
        return [one.standing(now_s) for one in records]

    def _begins(self, wish: AskFit, now_s: int) -> list[Span]:
        near_s = max(now_s, wish.near_s)
        within = (max(now_s, near_s - _HORIZON_S), near_s + wish.lasts_s + _HORIZON_S)
        with self._database.read() as connection:
            return self._stock.begins(connection, wish.wanted, wish.lasts_s, near_s, within)


def _sweep(connection: Connection, now_s: int) -> int:
    """What the clock has ended keeps nothing from here on; what nobody can ask for any more is forgotten."""
    rows = connection.execute(_ENDED, {"now_s": now_s}).all()
    for row in rows:
        record = _record(row)
        _let_go(connection, record.key, provider.at(record, now_s), now_s)
    keys = connection.execute(_FORGOTTEN, {"until_s": provider.forgotten_s(now_s)}).scalars().all()
    if keys:
        connection.execute(delete(hold).where(hold.c.key.in_(keys)))
    return len(rows) + len(keys)


def _let_go(connection: Connection, key: str, state: HoldState, now_s: int) -> None:
    connection.execute(_FREE_CLAIMS, {"at_key": key})
    levels.give_back(connection, key)
    connection.execute(update(hold).where(hold.c.key == key).values(state=state, gone_at_s=now_s))


def _known(connection: Connection, key: str, owner: str) -> Record:
    found = _find(connection, key)
    if found is None or found.owner != owner:
        raise NotFoundError("there is no such hold (any more)")
    return found


def _find(connection: Connection, key: str) -> Record | None:
    row = connection.execute(_FIND, {"key": key}).one_or_none()
    return None if row is None else _record(row)


def _record(row: Row[Any]) -> Record:
    return Record(
        key=row.key,
        print=row.print,
        owner=row.owner,
        reservation=row.reservation,
        window=Window(begins_at_s=row.begins_at_s, ends_at_s=row.ends_at_s),
        expires_at_s=row.expires_at_s,
        state=HoldState(row.state),
        grant=Grant.model_validate_json(row.grant),
        gone_at_s=row.gone_at_s,
    )


def row_of(record: Record) -> dict[str, Any]:
    """A record as its columns."""
    return {
        "key": record.key,
        "print": record.print,
        "owner": record.owner,
        "reservation": record.reservation,
        "begins_at_s": record.window.begins_at_s,
        "ends_at_s": record.window.ends_at_s,
        "expires_at_s": record.expires_at_s,
        "state": record.state,
        "grant": record.grant.model_dump_json(),
        "gone_at_s": record.gone_at_s,
    }

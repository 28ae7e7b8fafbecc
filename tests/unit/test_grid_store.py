"""The store: its schema, its promises in processes that race and are killed, what it says about time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, text, update
from sqlalchemy.exc import IntegrityError

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.messages.coalloc import (
    AskFit,
    AskOffer,
    Hold,
    HoldAnswer,
    HoldState,
    Nodes,
    Paths,
    Window,
)
from virtgrid.grid.messages.coalloc import (
    Path as Way,
)
from virtgrid.grid.nrm.stock import NetworkStock
from virtgrid.grid.store.audit import audit
from virtgrid.grid.store.database import Database, revision
from virtgrid.grid.store.promises import TENTATIVE_LIMIT, Promises
from virtgrid.grid.store.schema import claim, level, link, metadata

NOW_S = 1_800_000_000
HOUR_S = 3600
ME = "grc1"


def window(begins: float = 0, lasts: float = 1) -> Window:
    """In hours from NOW_S on."""
    at_s = NOW_S + round(begins * HOUR_S)
    return Window(begins_at_s=at_s, ends_at_s=at_s + round(lasts * HOUR_S))


@dataclass
class Site:
    promises: Promises
    made: int = 0

    def hold(
        self, nodes: int = 2, addresses: str = "10.1.0.0/28", when: Window | None = None, key: str = ""
    ) -> HoldAnswer:
        wanted = Nodes(nodes=nodes, addresses=addresses)
        return self.promises.hold(self.asked(wanted, when or window(), key), owner=ME, now_s=NOW_S)

    def asked(self, wanted: Nodes | Paths, when: Window, key: str = "") -> Hold:
        self.made += 1
        return Hold(
            key=key or f"key-{self.made:06d}",
            reservation="r1",
            window=when,
            ttl_s=30,
            asked_at_s=NOW_S,
            wanted=wanted,
        )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "grid.db") as opened:
        yield opened


@pytest.fixture
def site(database: Database) -> Site:
    stock = SiteStock(nodes=["n1", "n2", "n3"], ranges=["10.1.0.0/24", "10.2.0.0/24"])
    return Site(Promises(database, "alpha", stock))


@pytest.fixture
def network(database: Database) -> Site:
    stock = NetworkStock(links={("alpha", "beta"): 1000}, segments=(100, 102))
    with database.write() as connection:
        stock.prepare(connection)
    return Site(Promises(database, "net", stock))


# -- the file ------------------------------------------------------------------------------------


def test_the_revisions_make_the_tables_the_code_knows(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == revision()
        checks = connection.execute(text("PRAGMA integrity_check")).scalar()
    assert checks == "ok"


def test_a_file_is_for_its_owner_and_opened_again_as_it_was(site: Site, database: Database) -> None:
    assert database.path.stat().st_mode & 0o777 == 0o600
    site.hold()
    with Database(database.path) as again:
        stock = SiteStock(nodes=["n1"], ranges=["10.1.0.0/24"])
        assert len(Promises(again, "alpha", stock).standing(NOW_S)) == 1


def test_what_another_version_wrote_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.db"
    Database(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(RefusedError, match="was written by another version of virtgrid"):
        Database(path)
    (tmp_path / "other.db").write_bytes(b"no database at all, but long enough to be looked at" * 40)
    with pytest.raises(RefusedError, match="is no database of virtgrid"):
        Database(tmp_path / "other.db")


def test_the_file_itself_refuses_to_give_a_unit_twice(site: Site, database: Database) -> None:
    site.hold(nodes=1)
    for begins, lasts in ((0, 1), (-0.5, 1), (0.5, 1), (-1, 3), (0.25, 0.5)):
        when = window(begins, lasts)
        row = {"kind": "node", "unit": "n1", "begins_at_s": when.begins_at_s, "ends_at_s": when.ends_at_s}
        with pytest.raises(IntegrityError), database.write() as connection:
            connection.execute(insert(claim).values(**row, hold="key-000001"))
    with pytest.raises(IntegrityError, match="never changed"), database.write() as connection:
        connection.execute(update(claim).values(ends_at_s=NOW_S + 10**6))


def test_the_file_itself_refuses_to_promise_more_than_a_link_has(network: Site, database: Database) -> None:
    paths = Paths(sites=("alpha", "beta"), paths=(Way(between=("alpha", "beta"), rate_bytes_s=600),))
    network.promises.hold(network.asked(paths, window()), owner=ME, now_s=NOW_S)
    for used in (1001, -1):
        with pytest.raises(IntegrityError), database.write() as connection:
            connection.execute(update(level).values(used_bytes_s=used))
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(insert(link).values(name="x-y", capacity_bytes_s=0))


# -- holds ---------------------------------------------------------------------------------------


def test_the_same_key_is_the_same_hold_and_other_words_are_refused(site: Site) -> None:
    first = site.hold(key="the-one-key")
    assert site.hold(key="the-one-key") == first
    with pytest.raises(RefusedError, match="the key of this HOLD was used for another one"):
        site.hold(nodes=1, key="the-one-key")
    assert len(site.promises.standing(NOW_S)) == 1


def test_a_lapsed_hold_is_free_for_others_at_once_and_cannot_be_committed(site: Site) -> None:
    first = site.hold(nodes=3).standing
    assert first is not None
    later_s = first.expires_at_s
    asked = site.asked(Nodes(nodes=3, addresses="10.1.0.0/28"), window()).model_copy(
        update={"asked_at_s": later_s}
    )
    assert site.promises.hold(asked, owner=ME, now_s=later_s).standing
    with pytest.raises(RefusedError, match="COMMIT comes too late"):
        site.promises.commit(first.key, owner=ME, now_s=later_s)
    # A clock that is set back raises nothing from the dead.
    with pytest.raises(RefusedError, match="has expired"):
        site.promises.commit(first.key, owner=ME, now_s=NOW_S)


def test_a_refusal_says_why_and_when_it_could_be_had(site: Site) -> None:
    site.hold(nodes=2, when=window(0, 2))
    refusal = site.hold(nodes=2, addresses="10.2.0.0/28", when=window(1, 1)).refusal
    assert refusal is not None
    assert refusal.why == "2 nodes were asked for, and 1 is free"
    assert refusal.nearest[0] == window(2, 1)
    taken = site.hold(nodes=1, addresses="10.1.0.8/29").refusal
    assert taken is not None
    assert taken.why == "addresses 10.1.0.8/29 are taken"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Nodes(nodes=4, addresses="10.1.0.0/28"), "4 nodes were asked for, and there are 3"),
        (Nodes(nodes=1, addresses="10.9.0.0/28"), "10.9.0.0/28 is not among the advertised ranges"),
        (Paths(sites=("alpha", "beta")), "a site has nodes and addresses, and no paths"),
    ],
)
def test_what_a_site_never_has_is_refused_and_changes_nothing(
    site: Site, database: Database, wanted: Nodes | Paths, words: str
) -> None:
    before = _dump(database.path)
    with pytest.raises(RefusedError, match=words):
        site.promises.hold(site.asked(wanted, window()), owner=ME, now_s=NOW_S)
    assert _dump(database.path) == before


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Paths(sites=("alpha", "beta"), segment=7), "segment 7 is out of range"),
        (
            Paths(sites=("alpha", "gamma"), paths=(Way(between=("alpha", "gamma"), rate_bytes_s=1),)),
            "there is no link between alpha and gamma",
        ),
        (
            Paths(sites=("alpha", "beta"), paths=(Way(between=("alpha", "beta"), rate_bytes_s=1001),)),
            "0.008008 Mbit/s were asked for on alpha-beta, which has 0.008 Mbit/s",
        ),
        (Nodes(nodes=1, addresses="10.1.0.0/28"), "and no nodes"),
    ],
)
def test_what_a_network_never_has_is_refused_and_changes_nothing(
    network: Site, database: Database, wanted: Nodes | Paths, words: str
) -> None:
    before = _dump(database.path)
    with pytest.raises(RefusedError, match=words):
        network.promises.hold(network.asked(wanted, window()), owner=ME, now_s=NOW_S)
    assert _dump(database.path) == before


def test_segments_and_bandwidth_are_given_back(network: Site, database: Database) -> None:
    paths = Paths(sites=("alpha", "beta"), paths=(Way(between=("alpha", "beta"), rate_bytes_s=400),))
    keys = []
    for when in (window(0, 2), window(1, 2), window(5, 1)):
        answer = network.promises.hold(network.asked(paths, when), owner=ME, now_s=NOW_S)
        assert answer.standing is not None
        keys.append(answer.standing.key)
    refusal = network.promises.hold(network.asked(paths, window(0.5, 1)), owner=ME, now_s=NOW_S).refusal
    assert refusal is not None
    assert refusal.why == "0.0032 Mbit/s were asked for on alpha-beta, and 0.0016 Mbit/s are left"
    assert window(0, 1) in refusal.nearest
    for key in keys:
        network.promises.release(key, owner=ME, now_s=NOW_S)
        network.promises.release(key, owner=ME, now_s=NOW_S)
    with database.read() as connection:
        for table in ("claim", "level", "flow"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 0


def test_an_offer_tells_free_ranges_and_different_ones_to_different_askers(
    site: Site, database: Database
) -> None:
    site.hold(addresses="10.1.0.0/26")
    stock = SiteStock(nodes=["n1", "n2", "n3"], ranges=["10.1.0.0/24", "10.2.0.0/24"])
    with database.read() as connection:
        offers = [
            stock.offer(connection, AskOffer(window=window(), prefix=26, spread=spread)) for spread in (0, 5)
        ]
    assert offers[0].nodes_free == 1
    assert offers[0].free[0] == "10.1.0.64/26"
    assert offers[1].free[0] == "10.2.0.64/26"
    assert all("10.1.0.0/26" not in offer.free for offer in offers)


def test_a_coordinator_has_a_bounded_number_of_holds_open(site: Site, database: Database) -> None:
    with database.write() as connection:
        connection.execute(
            text(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :many)"
                " INSERT INTO hold SELECT 'other-' || i, 'p', :me, 'r', :now, :later, :later, 'HELD', '{}',"
                " NULL FROM n"
            ),
            {"many": TENTATIVE_LIMIT, "me": ME, "now": NOW_S, "later": NOW_S + 600},
        )
    with pytest.raises(RefusedError, match="has 1024 holds open"):
        site.hold()
    nodes = Nodes(nodes=1, addresses="10.1.0.0/28")
    assert site.promises.hold(site.asked(nodes, window()), owner="grc2", now_s=NOW_S).standing


def test_a_hold_is_its_coordinators_own(site: Site) -> None:
    standing = site.hold().standing
    assert standing is not None
    with pytest.raises(NotFoundError):
        site.promises.commit(standing.key, owner="somebody", now_s=NOW_S)
    site.promises.release(standing.key, owner="somebody", now_s=NOW_S)
    assert site.promises.status(standing.key, owner=ME, now_s=NOW_S).state is HoldState.HELD


def test_the_sweep_leaves_nothing_of_what_is_over(site: Site, database: Database) -> None:
    for number in range(3):
        standing = site.hold(nodes=1, addresses=f"10.1.0.{16 * number}/28").standing
        assert standing is not None
        if number:
            site.promises.commit(standing.key, owner=ME, now_s=NOW_S)
    assert site.promises.sweep(NOW_S + 2 * HOUR_S) == 3
    assert site.promises.sweep(NOW_S + 4 * HOUR_S) == 3
    assert [row for row in _dump(database.path) if row.startswith("INSERT") and "alembic" not in row] == []


def test_when_it_fits_is_said_around_the_wanted_time(site: Site) -> None:
    site.hold(nodes=3, when=window(1, 1))
    site.hold(nodes=3, when=window(4, 1))
    wish = AskFit(
        near_s=window(1.5).begins_at_s,
        lasts_s=2 * HOUR_S,
        wanted=Nodes(nodes=1, addresses="10.1.0.0/28"),
    )
    begins = site.promises.fit(wish, now_s=NOW_S).begins
    assert (begins[0].first_s, begins[0].last_s) == (NOW_S + 2 * HOUR_S, NOW_S + 2 * HOUR_S)
    assert begins[1].first_s == NOW_S + 5 * HOUR_S


def test_the_audit_finds_what_the_tables_would_have_refused(
    site: Site, network: Site, database: Database
) -> None:
    site.hold(nodes=1)
    paths = Paths(sites=("alpha", "beta"), paths=(Way(between=("alpha", "beta"), rate_bytes_s=600),))
    network.promises.hold(network.asked(paths, window(), "key-network"), owner=ME, now_s=NOW_S)
    assert audit(database) == []
    with database.write() as connection:
        for words in (
            "INSERT INTO hold SELECT key || 'x', print, owner, reservation, begins_at_s, ends_at_s,"
            " expires_at_s, state, grant, gone_at_s FROM hold",
            "INSERT INTO flow SELECT hold || 'x', link, rate_bytes_s FROM flow",
            "UPDATE hold SET state = 'RELEASED' WHERE key = 'key-network'",
        ):
            connection.execute(text(words))
    found = audit(database)
    assert f"n1 is promised to key-000001 and to key-000001x at {window().begins_at_s}" in found
    assert "1200 bytes/s of alpha-beta are promised, which has 1000" in found
    assert "hold key-network keeps something and is gone" in found


# -- processes -----------------------------------------------------------------------------------


def _race(path: Path, number: int, won: list[str]) -> None:
    stock = SiteStock(nodes=["n1", "n2", "n3"], ranges=["10.1.0.0/24"])
    with Database(path) as database:
        promises = Promises(database, "alpha", stock)
        for turn in range(20):
            asked = Hold(
                key=f"key-{number}-{turn:04d}",
                reservation=f"r{number}",
                window=window(turn % 4, 1.5),
                ttl_s=600,
                asked_at_s=NOW_S,
                wanted=Nodes(nodes=1, addresses=f"10.1.0.{turn % 8 * 16}/28"),
            )
            answer = promises.hold(asked, owner=f"grc{number}", now_s=NOW_S)
            if answer.standing is not None:
                won.append(answer.standing.model_dump_json())


def test_racing_processes_are_given_nothing_twice(tmp_path: Path) -> None:
    Database(tmp_path / "grid.db").close()
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        won = manager.list()
        racers = [
            context.Process(target=_race, args=(tmp_path / "grid.db", number, won)) for number in range(4)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(60)
            assert racer.exitcode == 0
        granted = [HoldAnswer.model_validate_json(f'{{"standing":{one}}}').standing for one in won]
    taken: list[tuple[str, Window]] = []
    for one in granted:
        assert one is not None
        for unit in (*one.grant.nodes, str(one.grant.addresses)):
            for other, when in taken:
                apart = when.ends_at_s <= one.window.begins_at_s or one.window.ends_at_s <= when.begins_at_s
                assert other != unit or apart
            taken.append((unit, one.window))
    assert len(granted) >= 3


def _hold_for_ever(path: Path, ready: int) -> None:
    stock = SiteStock(nodes=[f"n{i}" for i in range(200)], ranges=["10.0.0.0/8"])
    with Database(path) as database:
        promises = Promises(database, "alpha", stock)
        for turn in range(100_000):
            asked = Hold(
                key=f"key-{turn:06d}",
                reservation="r",
                window=window(turn, 1),
                ttl_s=600,
                asked_at_s=NOW_S,
                wanted=Nodes(nodes=50, addresses="10.0.0.0/24"),
            )
            standing = promises.hold(asked, owner=f"grc{turn}", now_s=NOW_S).standing
            assert standing is not None
            promises.commit(standing.key, owner=f"grc{turn}", now_s=NOW_S)
            os.write(ready, standing.key.encode() + b"\n")


def test_a_killed_provider_has_kept_what_it_promised_and_nothing_half(tmp_path: Path) -> None:
    path = tmp_path / "grid.db"
    Database(path).close()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _hold_for_ever(path, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        answered = [told.readline() for _ in range(12)]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        answered += told.readlines()
    with sqlite3.connect(path) as connection:
        states = dict(connection.execute("SELECT key, state FROM hold"))
        claims = dict(connection.execute("SELECT hold, count(*) FROM claim GROUP BY hold"))
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert {key.decode().strip() for key in answered} <= {
        key for key, state in states.items() if state == "COMMITTED"
    }
    assert claims == dict.fromkeys(states, 50 + 64)


def _dump(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        return list(connection.iterdump())

"""Coordinators and providers over TLS: who is heard, who is refused in one sentence, and that nothing is
changed then.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from grid_parts import ME, QUICK, Flaky, coordinating, providers, soon, until, wish
from wire_ends import nothing

from tests.wire_grid import GRC, Grid
from virtgrid.core.clock import Clock, FakeClock, SystemClock
from virtgrid.core.errors import (
    NotAdmittedError,
    NotFoundError,
    NotHeardError,
    PeerUnreachableError,
    RefusedError,
    UsageError,
)
from virtgrid.grid.coalloc.quota import Limits
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.doors import Network, identity, told_of
from virtgrid.grid.grc import members, parties
from virtgrid.grid.grc.coordinator import Coordinator, require_sense
from virtgrid.grid.grc.desk import Desk, adopt
from virtgrid.grid.grc.ledger import Quotas
from virtgrid.grid.grc.members import Members, crm_of
from virtgrid.grid.grc.parties import WireParty, said
from virtgrid.grid.messages.coalloc import (
    OFFER,
    AskOffer,
    Command,
    Grant,
    Hold,
    HoldAnswer,
    HoldState,
    Join,
    Leave,
    Nodes,
    Paths,
    ReservationState,
    Reserve,
    SiteWish,
    Standing,
    Wanted,
)
from virtgrid.grid.provide import Counter, Stored
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.reservations import Reservations
from virtgrid.wire.certificates import read_certificates
from virtgrid.wire.endpoint import Endpoint, HostPort, dial
from virtgrid.wire.identity import Role
from virtgrid.wire.line import Line
from virtgrid.wire.message import BadMessageError
from virtgrid.wire.tls import Tls

HERE = Endpoint(HostPort("127.0.0.1", 0))
ALPHA = "virtgrid://alpha/crm/crm"
KENJI, MARY = "virtgrid://alpha/user/kenji", "virtgrid://beta/user/mary"
ASK_OFFER = AskOffer(window=soon(), prefix=30).model_dump()


@dataclass
class Crm:
    where: Endpoint
    database: Database

    def dump(self) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.exec_driver_sql("SELECT key, owner, state FROM hold ORDER BY key"))


@asynccontextmanager
async def crm(
    directory: Path, tls: Tls, *, told: tuple[str, ...] = (GRC,), site: str = "alpha"
) -> AsyncIterator[Crm]:
    """A site on the network, that hears these coordinators."""
    with Database(directory / f"{site}.db") as database:
        stock = SiteStock(nodes=["n1", "n2"], ranges=["10.1.0.0/24"])
        provider = Stored(party=site, database=database, stock=stock, clock=SystemClock())
        network = Network(where=HERE, tls=tls)
        async with Counter(
            provider,
            Endpoint(directory / f"{site}.sock"),
            network=network,
            told=frozenset(map(told_of, told)),
        ) as counter:
            assert counter.doors.network is not None
            yield Crm(counter.doors.network, database)
        provider.close()


@asynccontextmanager
async def reaching(where: Endpoint, tls: Tls | None, site: str = "alpha") -> AsyncIterator[WireParty]:
    party = crm_of(site, where, tls)
    try:
        yield party
    finally:
        await party.close()


def asked(**changed: Any) -> Hold:
    what: dict[str, Any] = {
        "key": "key-000001",
        "reservation": "r1",
        "window": soon(),
        "ttl_s": 30,
        "asked_at_s": int(time.time()),
        "wanted": Nodes(nodes=1, addresses="10.1.0.0/30"),
    }
    return Hold(**{**what, **changed})


async def hold(party: WireParty) -> Any:
    return await party.call(Command.HOLD, asked().model_dump(mode="json"), deadline_s=10)


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path / "grid")


# -- a provider and its coordinators -------------------------------------------------------------


async def test_a_provider_hears_the_coordinators_it_was_told_of(grid: Grid, tmp_path: Path) -> None:
    async with (
        crm(tmp_path, grid.tls(ALPHA)) as site,
        reaching(site.where, grid.tls(GRC)) as party,
    ):
        assert (await hold(party))["standing"]["state"] == "HELD"
        assert str(party.who) == ALPHA
        assert site.dump() == [("key-000001", GRC, "HELD")]


@pytest.mark.parametrize(
    "stranger",
    [
        "virtgrid://b/grc/other",
        "virtgrid://alpha/grc/grc",
        KENJI,
        "virtgrid://alpha/host/n1",
        "virtgrid://alpha/nrm/nrm",
    ],
)
@pytest.mark.parametrize("method", [*Command, "OFFER", "STATUS", "FIT"])
async def test_nobody_else_is_heard_whatever_the_certificate(
    grid: Grid, tmp_path: Path, stranger: str, method: str
) -> None:
    async with (
        crm(tmp_path, grid.tls(ALPHA)) as site,
        reaching(site.where, grid.tls(GRC)) as told,
        reaching(site.where, grid.tls(stranger)) as party,
    ):
        await hold(told)
        before = site.dump()
        with pytest.raises(NotAdmittedError) as refused:
            await party.call(method, {"key": "key-000001"}, deadline_s=10)
        assert refused.value.what == (
            f"alpha does not hear us: {stranger} may not ask {method}:"
            " it is not among those this service was told of"
        )
        if "/grc/" in stranger:
            assert refused.value.hint == f"it is when the service is started with --grc {stranger}"
        assert site.dump() == before


async def test_a_user_of_the_host_is_no_coordinator_unless_told(
    tmp_path: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Line, "peer_uid", lambda _: 5001)
    here = Endpoint(tmp_path / "alpha.sock")
    async with crm(tmp_path, grid.tls(ALPHA)) as site, reaching(here, None) as party:
        with pytest.raises(NotAdmittedError, match="user 5001 of this host may not ask HOLD"):
            await hold(party)
        assert site.dump() == []
    async with crm(tmp_path, grid.tls(ALPHA), told=("uid:5001",)) as site, reaching(here, None) as party:
        await hold(party)
        assert site.dump() == [("key-000001", "uid:5001", "HELD")]


async def test_the_crm_of_another_site_is_asked_nothing(grid: Grid, tmp_path: Path) -> None:
    async with (
        crm(tmp_path, grid.tls("virtgrid://beta/crm/crm")) as site,
        reaching(site.where, grid.tls(GRC)) as party,
    ):
        with pytest.raises(NotAdmittedError) as refused:
            await hold(party)
        assert "virtgrid://beta/crm/crm answers, which is no crm of site alpha" in refused.value.what
        assert refused.value.hint
        assert site.dump() == []


async def test_a_foreign_authority_is_refused_on_either_side(grid: Grid, tmp_path: Path) -> None:
    other = Grid(tmp_path / "other")
    async with crm(tmp_path, other.tls(ALPHA)) as site, reaching(site.where, grid.tls(GRC)) as party:
        with pytest.raises(NotAdmittedError, match="of an authority that is not trusted here") as refused:
            await hold(party)
        assert "virtgrid pki show" in said(refused.value)
        assert site.dump() == []
    ours, theirs = grid.enrol(GRC), other.enrol(GRC).files(Role.GRC)
    tls = Tls(replace(theirs, trust=ours.trust, revoked=None))
    async with crm(tmp_path, grid.tls(ALPHA)) as site, reaching(site.where, tls) as party:
        with pytest.raises(PeerUnreachableError, match="does not let us in"):
            await hold(party)
        assert site.dump() == []


async def test_an_expired_certificate_is_refused_on_either_side(grid: Grid, tmp_path: Path) -> None:
    ago = {"ago": timedelta(days=3), "lifetime": timedelta(days=2)}
    async with crm(tmp_path, grid.tls(ALPHA, **ago)) as site, reaching(site.where, grid.tls(GRC)) as party:
        with pytest.raises(NotAdmittedError, match="its certificate has expired"):
            await hold(party)
    then = FakeClock(grid.now - timedelta(days=2))
    old = Tls(grid.enrol(GRC, **ago).files(Role.GRC), clock=then)
    async with crm(tmp_path, grid.tls(ALPHA)) as site, reaching(site.where, old) as party:
        with pytest.raises(PeerUnreachableError, match="does not let us in"):
            await hold(party)
        assert site.dump() == []


@pytest.mark.parametrize("ahead_s", [-120, 120])
async def test_a_clock_two_minutes_off_is_refused_by_name(grid: Grid, tmp_path: Path, ahead_s: int) -> None:
    clock: Clock = FakeClock(grid.now + timedelta(seconds=ahead_s))
    async with (
        crm(tmp_path, grid.tls(ALPHA, clock=clock)) as site,
        reaching(site.where, grid.tls(GRC)) as party,
    ):
        with pytest.raises(
            NotAdmittedError, match=r"the clock of alpha at tls://.* ours; at most"
        ) as refused:
            await hold(party)
        assert "chronyc tracking" in said(refused.value)
        assert site.dump() == []


async def test_a_certificate_renewed_under_a_standing_line_is_shown_on_the_next(
    grid: Grid, tmp_path: Path
) -> None:
    mine, theirs = grid.enrol(GRC), grid.enrol(ALPHA)
    async with (
        crm(tmp_path, Tls(theirs.files(Role.CRM))) as site,
        reaching(site.where, Tls(mine.files(Role.GRC))) as party,
    ):
        await party.call(OFFER, ASK_OFFER, deadline_s=10)
        serial = read_certificates(mine.certificate(Role.GRC))[0].serial_number
        grid.enrol(GRC)
        grid.authority.revoke(f"{serial:x}", now=grid.now)
        theirs.revoked.write_bytes(grid.authority.revoked_file.read_bytes())
        assert (await hold(party))["standing"]["state"] == "HELD"
        grid.authority.revoke(GRC, now=grid.now)
        theirs.revoked.write_bytes(grid.authority.revoked_file.read_bytes())
        with pytest.raises(PeerUnreachableError, match="does not let us in") as refused:
            await hold(party)
        assert "has been revoked" in said(refused.value)


async def test_a_dead_party_is_noticed_on_a_line_that_looks_alive(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parties, "IDLE_S", 0.05)
    monkeypatch.setattr(parties, "_PING_DEADLINE_S", 0.1)
    async with (
        crm(tmp_path, grid.tls(ALPHA)) as site,
        reaching(site.where, grid.tls(GRC)) as party,
    ):
        await party.call(OFFER, ASK_OFFER, deadline_s=10)
        line = party._line
        assert line is not None

        async def swallow(_: Any) -> None:
            """As a cable that was cut does."""

        monkeypatch.setattr(line, "_send", swallow)
        await until(lambda: line.lost is not None)
        assert (await hold(party))["standing"]["state"] == "HELD"


async def test_a_coordinator_that_is_not_heard_any_more_does_not_take_that_for_an_answer(
    grid: Grid, tmp_path: Path
) -> None:
    """COMMIT that a guard refuses is no "your hold has lapsed": nothing may be given up for it."""
    mine, theirs = grid.enrol(GRC), grid.enrol(ALPHA)
    one = wish(sites=(SiteWish(site="alpha", nodes=1),), bandwidth_bytes_s=None)

    def revoke() -> None:
        grid.authority.revoke(GRC, now=grid.now)
        theirs.revoked.write_bytes(grid.authority.revoked_file.read_bytes())

    async with crm(tmp_path, Tls(theirs.files(Role.CRM))) as site:
        line = Flaky(crm_of("alpha", site.where, Tls(mine.files(Role.GRC))))
        line.before[Command.COMMIT] = revoke
        with Database(tmp_path / "grc.db") as database:
            timing = replace(QUICK, answer_s=0.5)
            async with Coordinator(
                database=database, sites={"alpha": line}, network=None, clock=SystemClock(), timing=timing
            ) as coordinator:
                view = await coordinator.reserve(one, owner=ME)
                assert view.state is ReservationState.COMMITTING
                assert [state for _, _, state in site.dump()] == ["HELD"]
                grid.enrol(GRC)
                await until(lambda: [state for _, _, state in site.dump()] == ["COMMITTED"])
                await until(lambda: Reservations(database).find("r1").state is ReservationState.COMMITTED)


def _answer(hold: Hold, **changed: Any) -> HoldAnswer:
    what: dict[str, Any] = {
        "key": hold.key,
        "reservation": hold.reservation,
        "state": HoldState.HELD,
        "window": hold.window,
        "expires_at_s": hold.asked_at_s + 30,
        "grant": Grant(nodes=("n1",), addresses="10.1.0.0/30"),
    }
    return HoldAnswer(standing=Standing(**{**what, **changed}))


@pytest.mark.parametrize(
    ("wanted", "changed"),
    [
        (None, {"grant": Grant(nodes=("n1", "n1"), addresses="10.1.0.0/30")}),
        (None, {"grant": Grant(nodes=(), addresses="10.1.0.0/30")}),
        (None, {"grant": Grant(nodes=("n1",), addresses="10.9.0.0/30")}),
        (None, {"key": "key-000002"}),
        (None, {"window": soon(5)}),
        (Paths(sites=("a", "b")), {"grant": Grant()}),
        (Paths(sites=("a", "b"), segment=7), {"grant": Grant(segment=8)}),
    ],
)
def test_a_promise_of_something_else_is_none(wanted: Wanted | None, changed: dict[str, Any]) -> None:
    said = asked() if wanted is None else asked(wanted=wanted)
    good = {} if wanted is None else {"grant": Grant(segment=7)}
    require_sense(said, _answer(said, **good))
    with pytest.raises(BadMessageError, match="something else than was asked for"):
        require_sense(said, _answer(said, **{**good, **changed}))


# -- a coordinator and its users -----------------------------------------------------------------


@asynccontextmanager
async def desk(directory: Path, grid: Grid, **more: Any) -> AsyncIterator[tuple[Desk, Endpoint]]:
    """A coordinator of site alpha, over providers on sockets; users find it over the network, too."""
    async with providers(directory), coordinating(directory) as parts:
        tls = grid.tls("virtgrid://alpha/grc/grc")
        there = Network(where=HERE, tls=tls)
        where = Endpoint(directory / "grc.sock")
        async with Desk(parts.coordinator, where, network=there, site="alpha", **more) as made:
            assert made.doors.network is not None
            yield made, made.doors.network


@asynccontextmanager
async def user(where: Endpoint, tls: Tls | None) -> AsyncIterator[Line]:
    line = await dial(where, nothing, name="the coordinator", tls=tls, expect=Role.GRC)
    try:
        yield line
    finally:
        await line.close()


async def _ids(line: Line) -> list[str]:
    return [one["id"] for one in (await line.call("LIST"))["reservations"]]


async def test_users_see_and_cancel_their_own_and_are_the_same_on_a_host_of_their_site(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = 0
    monkeypatch.setattr(Line, "peer_uid", lambda line: uid if line.name == "a user" else 0)
    monkeypatch.setattr("virtgrid.wire.line._account", {0: "root", 5001: "kenji", 5002: "mary"}.get)
    one_each = (SiteWish(site="alpha", nodes=1), SiteWish(site="beta", nodes=1))
    async with (
        desk(tmp_path, grid) as (_, there),
        user(there, grid.tls(KENJI)) as kenji,
        user(there, grid.tls(MARY)) as mary,
    ):
        for line, id_ in ((kenji, "k1"), (mary, "m1")):
            asked = wish(id_, sites=one_each).model_dump(mode="json")
            assert (await line.call("RESERVE", asked))["state"] == "COMMITTED"
            assert await _ids(line) == [id_]
        for method in ("SHOW", "CANCEL"):
            with pytest.raises(NotFoundError, match="there is no reservation k1"):
                await mary.call(method, {"id": "k1"})
        seen = {}
        for uid in (0, 5001, 5002):
            async with user(Endpoint(tmp_path / "grc.sock"), None) as local:
                seen[uid] = await _ids(local)
                if uid == 5001:
                    assert (await local.call("CANCEL", {"id": "k1"}))["state"] == "RELEASED"
        # Mary of site beta is not the account mary of a host of site alpha.
        assert seen == {0: ["k1", "m1"], 5001: ["k1"], 5002: []}
        assert (await kenji.call("SHOW", {"id": "k1"}))["state"] == "RELEASED"


@pytest.mark.parametrize(
    "stranger", ["virtgrid://b/grc/grc", "virtgrid://alpha/crm/crm", "virtgrid://alpha/host/n1"]
)
async def test_who_is_no_user_reserves_nothing(grid: Grid, tmp_path: Path, stranger: str) -> None:
    async with desk(tmp_path, grid) as (_, there), user(there, grid.tls(stranger)) as line:
        with pytest.raises(NotHeardError, match=r"may not ask RESERVE: a \w+ has no business with it"):
            await line.call("RESERVE", wish().model_dump(mode="json"))
        with pytest.raises(NotHeardError):
            await line.call("LIST")


async def test_what_was_reserved_before_there_was_a_certificate_stays_its_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtgrid.wire.line._account", {0: "root", 5001: "kenji"}.get)
    async with providers(tmp_path), coordinating(tmp_path) as parts:
        for number, uid in enumerate((0, 5001, 5009)):
            one = wish(f"r{number}", sites=(SiteWish(site="alpha", nodes=1),), bandwidth_bytes_s=None)
            await parts.coordinator.reserve(one, owner=f"uid:{uid}")
    with Database(tmp_path / "grc.db") as database:
        for _ in range(2):
            adopt(Reservations(database), "alpha")
            owners = {Reservations(database).find(f"r{number}").owner for number in range(3)}
            assert owners == {"uid:0", KENJI, "virtgrid://alpha/user/uid-5009"}


async def test_a_limit_holds_over_a_restart_and_is_told(tmp_path: Path) -> None:
    quotas = Quotas(everybodys=Limits(reservations=1, said="/x.toml"))
    one, window = (SiteWish(site="alpha", nodes=1),), soon()

    def asking(id_: str) -> Reserve:
        return wish(id_, sites=one, bandwidth_bytes_s=None, window=window)

    async with providers(tmp_path):
        for first in (True, False):
            async with coordinating(tmp_path, quotas=quotas) as parts:
                if first:
                    assert (await parts.coordinator.reserve(asking("r1"), owner=KENJI)).state == "COMMITTED"
                with pytest.raises(RefusedError, match=f"{KENJI} has 1 reservation open, and 1 may be"):
                    await parts.coordinator.reserve(asking("r2"), owner=KENJI)
                assert (await parts.coordinator.reserve(asking("r1"), owner=KENJI)).state == "COMMITTED"
                if not first:
                    await parts.coordinator.cancel("r1", owner=KENJI)
                    assert (await parts.coordinator.reserve(asking("r2"), owner=KENJI)).state == "COMMITTED"
                with pytest.raises(NotFoundError):
                    await parts.coordinator.show("r3", owner=KENJI)


async def test_one_who_asks_for_what_nobody_has_fills_no_disk(tmp_path: Path) -> None:
    sites = (SiteWish(site="alpha", nodes=1),)
    async with providers(tmp_path), coordinating(tmp_path) as parts:
        for who in (KENJI, MARY):
            for number in range(4):
                id_ = f"{who[-4:]}-{number}"
                asked = wish(id_, sites=sites, bandwidth_bytes_s=None, window=soon(8000 * (number + 1)))
                await parts.coordinator.reserve(asked, owner=who)
                if number:
                    await parts.coordinator.cancel(id_, owner=who)
        Reservations(parts.databases["grc"]).forget_beyond(2)
        left = {one.wish.id for one in Reservations(parts.databases["grc"]).after("", owner=None)}
        assert left == {f"{who}-{number}" for who in ("enji", "mary") for number in (0, 2, 3)}


async def test_what_was_begun_is_finished_when_its_user_hangs_up(tmp_path: Path) -> None:
    async with providers(tmp_path), coordinating(tmp_path) as parts:
        here = Endpoint(tmp_path / "grc.sock")
        async with Desk(parts.coordinator, here), user(here, None) as line:
            parts.lines["alpha"].before["OFFER"] = lambda: line.hang_up("Ctrl-C")
            with pytest.raises(PeerUnreachableError):
                await line.call("RESERVE", wish().model_dump(mode="json"))
            await until(lambda: parts.state("r1") is ReservationState.COMMITTED)


# -- sites that join -----------------------------------------------------------------------------


@asynccontextmanager
async def joinable(directory: Path, tls: Tls | None) -> AsyncIterator[tuple[Coordinator, Members]]:
    """A coordinator that was started with one site, given, and those that have joined."""
    file = directory / "grc.sites"
    joined = members.read(file)
    given = WireParty("given", Endpoint(directory / "given.sock"))
    crms = {"given": given, **{name: crm_of(name, where, tls) for name, where in joined.items()}}
    with Database(directory / "grc.db") as database:
        async with Coordinator(
            database=database, sites=crms, network=None, clock=SystemClock(), timing=QUICK
        ) as coordinator:
            yield coordinator, Members(file, coordinator=coordinator, parties=crms, joined=joined, tls=tls)


async def test_a_site_joins_while_its_coordinator_runs_and_leaves_when_it_keeps_nothing(
    grid: Grid, tmp_path: Path
) -> None:
    one = wish(sites=(SiteWish(site="alpha", nodes=1),), bandwidth_bytes_s=None)
    async with crm(tmp_path, grid.tls(ALPHA)) as site:
        tls = grid.tls(GRC)
        async with joinable(tmp_path, tls) as (coordinator, known):
            with pytest.raises(RefusedError, match="there is no site 'alpha'"):
                await coordinator.reserve(one, owner=ME)
            for _ in range(2):  # an answer may be lost, and it is said again
                view = await known.join(Join(site="alpha", at=str(site.where)))
                assert (view.nodes, view.who, view.joined) == (2, ALPHA, True)
            assert (await coordinator.reserve(one, owner=ME)).state is ReservationState.COMMITTED
            assert members.read(tmp_path / "grc.sites") == {"alpha": site.where}
        async with joinable(tmp_path, tls) as (coordinator, known):
            told = {one.party: one for one in known.told(await coordinator.sites()).sites}
            assert (told["alpha"].who, told["alpha"].at) == (ALPHA, str(site.where))
            assert told["given"].problem
            with pytest.raises(RefusedError, match="1 open reservation has nodes of alpha"):
                await known.leave(Leave(site="alpha"))
            with pytest.raises(RefusedError, match="'given' did not join"):
                await known.leave(Leave(site="given"))
            await coordinator.cancel("r1", owner=ME)
            await known.leave(Leave(site="alpha"))
            assert members.read(tmp_path / "grc.sites") == {}
            with pytest.raises(NotFoundError):
                await known.leave(Leave(site="alpha"))
            with pytest.raises(RefusedError, match="there is no site 'alpha'"):
                await coordinator.reserve(wish("r2", sites=one.sites, bandwidth_bytes_s=None), owner=ME)


async def test_who_is_not_what_was_meant_does_not_join(grid: Grid, tmp_path: Path) -> None:
    other = Grid(tmp_path / "other")
    file = tmp_path / "grc.sites"
    (tmp_path / "x").mkdir()
    tls = grid.tls(GRC)
    wrong = FakeClock(grid.now + timedelta(minutes=2))
    expired = {"ago": timedelta(days=3), "lifetime": timedelta(days=2)}
    cases: list[tuple[Callable[[], Tls], str, str]] = [
        (lambda: grid.tls("virtgrid://beta/crm/crm"), GRC, "which is no crm of site alpha"),
        (lambda: grid.tls("virtgrid://alpha/nrm/nrm"), GRC, "which is no crm of site alpha"),
        (lambda: other.tls(ALPHA), GRC, "of an authority that is not trusted here"),
        (lambda: grid.tls(ALPHA, clock=wrong), GRC, r"1[12]\d s ahead of ours"),
        (lambda: grid.tls(ALPHA), "virtgrid://b/grc/other", "may not ask OFFER"),
        (lambda: grid.tls(ALPHA, **expired), GRC, "its certificate has expired"),
    ]
    async with joinable(tmp_path, tls) as (coordinator, known):
        for number, (theirs, told, words) in enumerate(cases):
            (tmp_path / f"x/{number}").mkdir()
            async with crm(tmp_path / f"x/{number}", theirs(), told=(told,)) as site:
                with pytest.raises(
                    PeerUnreachableError, match=f"site alpha cannot join: .*{words}"
                ) as refused:
                    await known.join(Join(site="alpha", at=str(site.where)))
                assert refused.value.hint
        for join, words in (
            (Join(site="given", at="tls://127.0.0.1:1"), "there is a 'given' already"),
            (Join(site="alpha", at=f"unix:{tmp_path}/given.sock"), "is where given is, and not another site"),
            (
                Join(site="alpha", at=f"unix:{tmp_path}/nobody.sock"),
                "site alpha cannot join: alpha cannot be reached",
            ),
            (Join(site="alpha", at="alpha"), "is no endpoint"),
        ):
            with pytest.raises((RefusedError, PeerUnreachableError, UsageError), match=words):
                await known.join(join)
        assert not file.exists()
        assert [one.party for one in (await coordinator.sites()).sites] == ["given"]
    async with joinable(tmp_path, None) as (_, known):
        with pytest.raises(RefusedError, match="no certificate to show over the network"):
            await known.join(Join(site="alpha", at="tls://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alpha\n", "line 1: '' is no endpoint"),
        ("# x\n\nalpha=tls://a:1\nalpha=tls://b:1\n", "line 4: site alpha stands there twice"),
        ("Alpha=tls://a:1\n", "line 1: the name of a party: "),
        ("\x00\xff=\n", "line 1: the name of a party: "),
    ],
)
def test_a_file_of_sites_that_somebody_spoilt_is_refused_by_line(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "grc.sites"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(RefusedError, match=words):
        members.read(file)


async def test_sites_join_and_leave_by_root_of_the_coordinators_host_alone(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = 0
    monkeypatch.setattr(Line, "peer_uid", lambda _: uid)
    async with joinable(tmp_path, grid.tls(GRC)) as (coordinator, known):
        there = Network(where=HERE, tls=grid.tls(GRC))
        here = Endpoint(tmp_path / "grc.sock")
        async with Desk(coordinator, here, network=there, site="b", members=known) as made:
            assert made.doors.network is not None
            async with user(made.doors.network, grid.tls(KENJI)) as kenji:
                with pytest.raises(NotHeardError, match="may not ask LEAVE"):
                    await kenji.call("LEAVE", {"site": "given"})
            for uid in (5001, 0):
                words = "did not join" if uid == 0 else "user 5001 of this host may not ask LEAVE"
                async with user(here, None) as local:
                    with pytest.raises(RefusedError, match=words):
                        await local.call("LEAVE", {"site": "given"})


# -- who we are ----------------------------------------------------------------------------------


def test_a_certificate_of_somebody_else_is_not_taken_for_ones_own(grid: Grid, tmp_path: Path) -> None:
    alpha = grid.enrol(ALPHA)
    assert str(identity(alpha.directory, Role.CRM, site="alpha").identity) == ALPHA
    with pytest.raises(RefusedError, match=f"is the certificate of {ALPHA}, and a crm of site beta is to be"):
        identity(alpha.directory, Role.CRM, site="beta")
    with pytest.raises(RefusedError, match="there is no certificate of a grc below") as refused:
        identity(tmp_path, Role.GRC)
    assert refused.value.hint == "virtgrid pki request grc --site SITE --at HOST asks for one"
    alpha.certificate(Role.CRM).rename(alpha.certificate(Role.NRM))
    alpha.key(Role.CRM).rename(alpha.key(Role.NRM))
    with pytest.raises(RefusedError, match="and a nrm is to be here"):
        identity(alpha.directory, Role.NRM)


@pytest.mark.parametrize("text", ["grc", "uid:-1", "uid:x", "virtgrid://a/crm/x", "virtgrid://a/grc", ""])
def test_what_is_no_coordinator_cannot_be_told_of(text: str) -> None:
    with pytest.raises(UsageError, match="--grc: "):
        told_of(text)

"""Real coordinators and providers over TLS on the loopback: who may what, who is refused, who is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from grid_parts import end_programs, soon, until, wish
from wire_ends import nothing

from tests.wire_grid import Grid
from virtgrid.cli.main import app
from virtgrid.core.errors import NotFoundError, VirtgridError
from virtgrid.grid.messages.coalloc import RESERVE, SHOW, ReservationState, SiteWish, View
from virtgrid.grid.store.audit import audit
from virtgrid.grid.store.database import Database
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki.places import Places
from virtgrid.wire.tls import Tls

VIRTGRID = (sys.executable, "-m", "virtgrid.cli.main")
#: The same, on a host whose clock is two minutes ahead.
VIRTGRID_AHEAD = (
    sys.executable,
    "-c",
    "import datetime, virtgrid.core.clock as clock, virtgrid.cli.main as cli\n"
    "right = clock.SystemClock.utc\n"
    "clock.SystemClock.utc = lambda self: right(self) + datetime.timedelta(minutes=2)\n"
    "cli.main()",
)
#: On the loopback, and nobody else's: a port here cannot be taken between a kill and the next start.
HERE: Final = f"127.{64 + (os.getpid() >> 16 & 63)}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
PORTS: Final = {"alpha": 7431, "beta": 7432, "net": 7433, "grc": 7434, "gamma": 7435, "early": 7436}
GRC = "virtgrid://beta/grc/main"
WHO = {
    "alpha": "virtgrid://alpha/crm/c1",
    "beta": "virtgrid://beta/crm/c1",
    "gamma": "virtgrid://gamma/crm/c1",
    "early": "virtgrid://early/crm/c1",
    "net": "virtgrid://beta/nrm/n1",
    "grc": GRC,
}
KENJI, MARY = "virtgrid://alpha/user/kenji", "virtgrid://gamma/user/mary"
QUOTA = f'[quota.of."{MARY}"]\nreservations = 1\nbandwidth = "100mbit"\n'


def at(name: str) -> str:
    return f"tls://{HERE}:{PORTS[name]}"


NETWORK: Final = ("--nrm", f"net={at('net')}")


@dataclass
class Programs:
    """Processes that can be killed and started again, with their certificates and files."""

    directory: Path
    members: Grid
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    def words(self, name: str, pki: Path) -> list[str]:
        common = [
            "--socket", f"unix:{self.directory}/{name}.sock", "--database", f"{self.directory}/{name}.db",
            "--listen", at(name), "--pki", str(pki),
        ]  # fmt: skip
        match name:
            case "net":
                return ["nrm", "--name", "net", "--link", "alpha:beta=1gbit", "--grc", GRC, *common]
            case "grc":
                return ["grc", "--crm", f"beta={at('beta')}", *common]
        nodes = [word for number in range(4) for word in ("--node", f"{name[0]}{number}")]
        addresses = f"10.77.{PORTS[name] - 7430}.0/24"
        return ["crm", "--site", name, *nodes, "--addresses", addresses, "--grc", GRC, *common]

    def start(self, name: str, *more: str, program: tuple[str, ...] = VIRTGRID) -> None:
        pki = self.members.places(WHO[name]).directory
        if not pki.exists():
            self.members.enrol(WHO[name])
        env = {**os.environ, "VIRTGRID_CONFIG": str(self.directory / "virtgrid.toml")}
        with (self.directory / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*program, "serve", *self.words(name, pki), *more], stderr=log, env=env
            )
        self.starts[name] = self.starts.get(name, 0) + 1

    def ready(self, name: str) -> bool:
        log = (self.directory / f"{name}.log").read_bytes()
        assert self.running[name].poll() is None, log.decode()[-2000:]
        return log.count(b"ready at") >= self.starts[name]

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running.pop(name).wait()

    def end(self) -> None:
        end_programs(self.running.values())

    def databases(self) -> list[Path]:
        return sorted(self.directory.glob("*.db"))

    def dump(self) -> list[str]:
        """Everything that anybody has written down."""
        lines = [path.read_text() for path in sorted(self.directory.glob("*.sites"))]
        for path in self.databases():
            with contextlib.closing(sqlite3.connect(path)) as connection:
                lines += connection.iterdump()
        return lines

    def holds(self) -> dict[str, list[str]]:
        """Of each reservation the states that keep something, over all providers."""
        found: dict[str, list[str]] = {}
        for path in self.databases():
            with contextlib.closing(sqlite3.connect(path)) as connection:
                rows = connection.execute(
                    "SELECT reservation, state FROM hold WHERE state IN ('HELD', 'COMMITTED')"
                    " AND (state = 'COMMITTED' OR expires_at_s > unixepoch())"
                )
                for reservation, state in rows:
                    found.setdefault(reservation, []).append(state)
        return found


class Said(dict[str, Any]):
    """What a command answered: status, out, err."""

    @property
    def json(self) -> Any:
        return json.loads(self["out"])

    def refused(self, status: int, *texts: str) -> None:
        """In one sentence, with a hint."""
        assert self["status"] == status, self
        assert self["err"].startswith("error: "), self
        assert len([line for line in self["err"].splitlines() if not line.startswith(" ")]) == 1
        assert "hint: " in self["err"], self
        assert "bug" not in self["err"]
        for text in texts:
            assert text in self["err"], self


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    (tmp_path / "virtgrid.toml").write_text(QUOTA)
    made = Programs(tmp_path, Grid(tmp_path / "grid", at=(HERE,)))
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def say(programs: Programs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command, as a user with a certificate below ``pki``; without one, as root on the host."""

    def said(*words: str, pki: Path | None = None) -> Said:
        where = f"unix:{programs.directory}/grc.sock" if pki is None else at("grc")
        monkeypatch.setenv("VIRTGRID_GRC", where)
        monkeypatch.setenv("VIRTGRID_PKI", str(pki))
        status = 0
        try:
            app(list(words), prog_name="virtgrid")
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 0
        out, err = capsys.readouterr()
        return Said(status=status, out=out, err=err)

    return said


def _await_ready(programs: Programs, *names: str) -> None:
    asyncio.run(until(lambda: all(programs.ready(name) for name in names), timeout_s=120))


def test_users_over_the_network_have_what_is_theirs_and_no_more(programs: Programs, say: Any) -> None:
    for name in ("alpha", "beta", "net"):
        programs.start(name)
    programs.start("grc", "--crm", f"alpha={at('alpha')}", *NETWORK)
    _await_ready(programs, *programs.running)
    kenji, mary = (programs.members.enrol(who).directory for who in (KENJI, MARY))
    asked = ("reserve", "--nodes", "alpha:1,beta:1", "--bandwidth", "100mbit", "--walltime", "1h", "--id")

    assert say(*asked, "k1", pki=kenji)["status"] == 0
    assert say(*asked, "m1", pki=mary)["status"] == 0
    sites = {one["party"]: one for one in say("site", "list", "--json", pki=mary).json}
    assert {name: one["who"] for name, one in sites.items()} == {name: WHO[name] for name in sites}
    assert [one["id"] for one in say("reservation", "list", "--json", pki=mary).json] == ["m1"]
    assert [one["id"] for one in say("reservation", "list", "--json").json] == ["k1", "m1"]

    before = programs.dump()
    say("reservation", "show", "k1", pki=mary).refused(4, "there is no reservation k1")
    say("reservation", "cancel", "k1", pki=mary).refused(4, "there is no reservation k1")
    limit = f"[quota] in {programs.directory}/virtgrid.toml"
    say(*asked, "m2", pki=mary).refused(3, f"{MARY} has 1 reservation open, and 1 may be", limit)
    say("site", "leave", "alpha", pki=mary).refused(3, f"{MARY} may not ask LEAVE")
    foreign = Grid(programs.directory / "foreign", at=(HERE,)).enrol(KENJI).directory
    say(*asked, "x1", pki=foreign).refused(8, "an authority that is not trusted here")
    gone = programs.members.enrol(
        "virtgrid://alpha/user/old", ago=timedelta(days=9), lifetime=timedelta(days=1)
    )
    say(*asked, "x2", pki=gone.directory).refused(8, "is not called: our own certificate")
    say(*asked, "x3", pki=programs.directory).refused(3, "there is no certificate of a user below")
    # A coordinator's certificate makes nobody a user.
    pretender = programs.members.enrol("virtgrid://alpha/grc/x")
    pretender.certificate(Role.GRC).rename(pretender.certificate(Role.USER))
    pretender.key(Role.GRC).rename(pretender.key(Role.USER))
    say(*asked, "x4", pki=pretender.directory).refused(3, "and a user is to be here")
    assert programs.dump() == before

    assert say("reservation", "cancel", "k1", pki=kenji)["status"] == 0
    assert set(programs.holds()) == {"m1"}


def test_a_site_that_is_not_what_was_meant_does_not_join_and_a_good_one_does(
    programs: Programs, say: Any
) -> None:
    """Another site's certificate, an expired one, a foreign authority, a wrong clock, a coordinator nobody
    told it of: each hears why, and nothing is changed. The certificates change under the running programs.
    """
    members, foreign = programs.members, Grid(programs.directory / "foreign", at=(HERE,))
    gamma, grc = members.enrol(WHO["gamma"]), members.enrol(GRC)
    programs.start("gamma")
    programs.start("early", program=VIRTGRID_AHEAD)
    programs.start("grc")
    _await_ready(programs, *programs.running)
    before = programs.dump()

    def joining(name: str, where: str, text: str) -> None:
        say("site", "join", name, where).refused(8, f"site {name} cannot join: ", text)
        assert programs.dump() == before

    def wears(places: Places, by: Grid, who: str, **enrol: Any) -> None:
        identity = Identity.parse(who)
        asked = {"now": by.now - enrol.pop("ago", timedelta(0)), "lifetime": timedelta(days=30), **enrol}
        by.authority.enrol(places, identity, by.at, **asked)

    joining("beside", at("gamma"), "virtgrid://gamma/crm/c1 answers, which is no crm of site beside")
    joining("early", at("early"), "s ahead of ours; at most 10 s are borne")
    joining("late", f"unix:{programs.directory}/late.sock", "late cannot be reached")
    wears(gamma, members, WHO["alpha"])
    joining("gamma", at("gamma"), "virtgrid://alpha/crm/c1 answers, which is no crm of site gamma")
    wears(gamma, members, WHO["gamma"], ago=timedelta(days=9), lifetime=timedelta(days=1))
    joining("gamma", at("gamma"), "its certificate has expired")
    wears(gamma, foreign, WHO["gamma"])
    joining("gamma", at("gamma"), "its certificate is of an authority that is not trusted here")
    wears(gamma, members, WHO["gamma"])
    wears(grc, members, "virtgrid://beta/grc/other")
    joining("gamma", at("gamma"), "virtgrid://beta/grc/other may not ask OFFER")
    wears(grc, members, GRC)
    say("site", "join", "beta", at("gamma")).refused(3, "there is a 'beta' already")
    assert programs.dump() == before

    assert say("site", "join", "gamma", at("gamma"))["status"] == 0
    assert say("reserve", "--nodes", "gamma:1", "--walltime", "1h", "--id", "g1")["status"] == 0
    say("site", "leave", "gamma").refused(3, "1 open reservation has nodes of gamma")
    assert say("reservation", "cancel", "g1")["status"] == 0
    assert say("site", "leave", "gamma")["status"] == 0
    say("reserve", "--nodes", "gamma:1", "--walltime", "1h").refused(3, "there is no site 'gamma'")


def test_a_program_that_could_never_be_spoken_to_does_not_start(
    programs: Programs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtgrid.cli.serve.log", lambda: None)
    alpha = ["--pki", str(programs.members.enrol(WHO["alpha"]).directory)]
    here = programs.directory / "bad"
    here.mkdir()
    files = ["--database", f"{here}/x.db", "--socket", f"unix:{here}/x.sock"]
    crm = ["crm", "--node", "a1", "--addresses", "10.77.1.0/24", *files, "--site"]
    grc = ["grc", *files, "--crm", f"alpha={at('alpha')}"]
    told, listen, none = ["--grc", GRC], ["--listen", at("alpha")], ["--pki", str(here)]
    for words, status, text in (
        ([*crm, "alpha", *told, *alpha, "--listen", f"unix:{here}/y.sock"], 2, "is no place in a network"),
        ([*crm, "alpha", *listen, *alpha], 2, "--listen without a --grc"),
        ([*crm, "alpha", "--grc", "main", *listen], 2, "--grc: 'main' is nobody of the grid"),
        ([*crm, "alpha", *told, *listen, *none], 3, "there is no certificate of a crm below"),
        ([*crm, "beta", *told, *listen, *alpha], 3, "and a crm of site beta is to be here"),
        ([*grc, *none], 3, "there is no certificate of a grc below"),
        ([*grc, "--crm", "alpha=unix:/x"], 2, "--crm: a site stands there twice"),
    ):
        with pytest.raises(SystemExit) as left:
            app(["serve", *words], prog_name="virtgrid")
        Said(status=left.value.code, out="", err=capsys.readouterr().err).refused(status, text)
    assert list(here.iterdir()) == []


async def test_programs_killed_over_the_network_leave_all_or_nothing(programs: Programs) -> None:
    """As over sockets; alpha has joined, and nobody says so again after a kill."""
    rng = random.Random(11)
    network = {"grc": NETWORK}
    for name in ("alpha", "beta", "net", "grc"):
        programs.start(name, *network.get(name, ()))
    await until(lambda: all(map(programs.ready, programs.running)), timeout_s=120)
    tls = Tls(programs.members.enrol(KENJI).files(Role.USER))
    local = Endpoint(programs.directory / "grc.sock")
    told: dict[str, ReservationState | None] = {}
    done = asyncio.Event()

    async def ask(method: str, params: dict[str, Any], where: Endpoint | None = None) -> Any:
        place = where or Endpoint.parse(at("grc"))
        line = await dial(place, nothing, name="the coordinator", tls=tls, expect=Role.GRC)
        try:
            return await line.call(method, params, deadline_s=30)
        finally:
            await line.close()

    def state(view: Any) -> ReservationState:
        return View.model_validate_json(json.dumps(view)).state

    async def use(number: int) -> None:
        """A user who reserves again and again, each time another hour."""
        turn = 0
        while not done.is_set():
            id_ = f"u{number}-{turn:03d}"
            sites = (SiteWish(site="alpha", nodes=1), SiteWish(site="beta", nodes=1))
            asked = wish(id_, sites=sites, window=soon(1 + turn, 1))
            told[id_] = None
            try:
                told[id_] = state(await ask(RESERVE, asked.model_dump(mode="json")))
            except VirtgridError:
                await asyncio.sleep(0.3)
            turn += 1

    await ask("JOIN", {"site": "alpha", "at": at("alpha")}, local)
    users = [asyncio.create_task(use(number)) for number in range(2)]
    for name in ("grc", "alpha", "net", "beta"):
        before = len(told)
        await until(lambda before=before: len(told) > before, timeout_s=120)
        await asyncio.sleep(rng.random() * 0.2)
        programs.kill(name)
        programs.start(name, *network.get(name, ()))
        await until(lambda name=name: programs.ready(name), timeout_s=120)
    before = sum(one is ReservationState.COMMITTED for one in told.values())
    await until(
        lambda: sum(one is ReservationState.COMMITTED for one in told.values()) > before, timeout_s=120
    )
    done.set()
    await asyncio.gather(*users)

    settled: dict[str, ReservationState | None] = {}
    open_ = {ReservationState.HOLDING, ReservationState.COMMITTING, ReservationState.RELEASING}
    line = await dial(Endpoint.parse(at("grc")), nothing, name="the coordinator", tls=tls, expect=Role.GRC)
    async with asyncio.timeout(120):
        for id_ in told:
            while settled.get(id_, ReservationState.HOLDING) in open_:
                try:
                    settled[id_] = state(await line.call(SHOW, {"id": id_}))
                except NotFoundError:
                    settled[id_] = None
                    break
                await asyncio.sleep(0 if settled[id_] not in open_ else 0.05)
    await line.close()
    # A HOLD that was on its way when its coordinator was killed lapses by itself.
    expected = {id_: 3 for id_, one in settled.items() if one is ReservationState.COMMITTED}
    await until(
        lambda: {id_: len(states) for id_, states in programs.holds().items()} == expected, timeout_s=120
    )
    assert all(set(states) == {"COMMITTED"} for states in programs.holds().values())
    for id_, one in told.items():
        if one not in (None, *open_):
            assert settled[id_] is one, id_
    assert expected
    for name in ("alpha", "beta", "net"):
        with Database(programs.directory / f"{name}.db") as database:
            assert audit(database) == []

"""Real programs: what a user types, what is refused, what is left when programs are killed at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from grid_parts import end_programs, soon, until, wish
from wire_ends import nothing

from virtgrid.cli.main import app
from virtgrid.core.errors import NotFoundError, VirtgridError
from virtgrid.grid.messages.coalloc import RESERVE, SHOW, ReservationState, SiteWish, View
from virtgrid.grid.store.audit import audit
from virtgrid.grid.store.database import Database
from virtgrid.wire.endpoint import Endpoint, dial

VIRTGRID = (sys.executable, "-m", "virtgrid.cli.main")


@dataclass
class Grid:
    """Two CRMs, an NRM and a GRC, each a process that can be killed and started again."""

    directory: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def grc(self) -> str:
        return f"unix:{self.directory}/grc.sock"

    def words(self, name: str) -> list[str]:
        here = f"unix:{self.directory}"
        common = ["--socket", f"{here}/{name}.sock", "--database", f"{self.directory}/{name}.db"]
        match name:
            case "alpha" | "beta":
                nodes = [word for number in range(4) for word in ("--node", f"{name[0]}{number}")]
                addresses = {"alpha": "10.77.1.0/24", "beta": "10.77.2.0/24"}[name]
                return ["crm", "--site", name, *nodes, "--addresses", addresses, *common]
            case "net":
                return ["nrm", "--name", "net", "--link", "alpha:beta=1gbit", *common]
            case _:
                crms = ["--crm", f"alpha={here}/alpha.sock", "--crm", f"beta={here}/beta.sock"]
                return ["grc", *crms, "--nrm", f"net={here}/net.sock", *common]

    def start(self, name: str) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen([*VIRTGRID, "serve", *self.words(name)], stderr=log)

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running.pop(name).wait()

    def listens(self, name: str) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(f"{self.directory}/{name}.sock")
            except OSError:
                return False
        return True

    def end(self) -> None:
        end_programs(self.running.values())

    def say(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "VIRTGRID_GRC": self.grc}
        return subprocess.run(
            [*VIRTGRID, *words], env=env, capture_output=True, text=True, timeout=60, check=False
        )

    def holds(self) -> dict[str, list[str]]:
        """Of each reservation the states that keep something, over all providers."""
        found: dict[str, list[str]] = {}
        for name in ("alpha", "beta", "net"):
            with contextlib.closing(sqlite3.connect(self.directory / f"{name}.db")) as connection:
                rows = connection.execute(
                    "SELECT reservation, state FROM hold WHERE state IN ('HELD', 'COMMITTED')"
                    " AND (state = 'COMMITTED' OR expires_at_s > unixepoch())"
                )
                for reservation, state in rows:
                    found.setdefault(reservation, []).append(state)
        return found

    def dump(self) -> list[str]:
        lines: list[str] = []
        for name in ("alpha", "beta", "net", "grc"):
            with contextlib.closing(sqlite3.connect(self.directory / f"{name}.db")) as connection:
                lines += connection.iterdump()
        return lines


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[Grid]:
    made = Grid(tmp_path)
    try:
        for name in ("alpha", "beta", "net", "grc"):
            made.start(name)
        asyncio.run(until(lambda: all(made.listens(name) for name in made.running), timeout_s=120))
        yield made
    finally:
        made.end()


def _bad(options: str, status: int, text: str) -> tuple[list[str], int, str]:
    """``nodes`` and ``walltime`` are what they should be, where nothing else is said."""
    words = dict(pair.split(" ") for pair in options.split(", "))
    words = {"nodes": "alpha:1,beta:1", "walltime": "1h", **words}
    return [word for name, value in words.items() for word in (f"--{name}", value)], status, text


BAD = [
    _bad("begin 2026-11-27T10:00", 2, "does not say in which zone"),
    _bad("begin 2020-01-01T00:00Z", 3, "the window ended"),
    _bad("walltime 0s", 2, "the window ends before it begins"),
    _bad("nodes alpha:0", 2, "nodes: Input should be greater than or equal to 1"),
    _bad("nodes alpha:-1", 2, "a site without a number"),
    _bad("nodes alpha:1,alpha:2", 2, "a site stands there twice"),
    _bad("nodes gamma:1", 3, "there is no site 'gamma'"),
    _bad("nodes alpha:4095", 2, "nodes: Input should be less than or equal to 4094"),
    _bad("id one", 3, "the id one was used for another reservation"),
    _bad("bandwidth 0mbit", 2, "bandwidth_bytes_s: "),
    _bad("bandwidth -5mbit", 2, "is not a rate"),
    _bad("bandwidth nan", 2, "is not a rate"),
    _bad("bandwidth inf", 2, "is not a rate"),
    _bad("addresses alpha=0.0.0.0/0", 2, "between /20 and /30"),
    _bad("addresses alpha=10.77.1.1/32", 2, "between /20 and /30"),
    _bad("segment 16777216", 2, "segment: "),
    (
        [*_bad("addresses alpha=10.77.1.0/28", 2, "")[0], "--addresses", "beta=10.77.1.8/29"],
        2,
        "10.77.1.0/28 of alpha and 10.77.1.8/29 of beta overlap",
    ),
]

#: What only a provider can refuse: the reservation's own record stays, with the reason, and nothing is kept.
MORE_THAN_THERE_IS = [
    _bad("nodes alpha:5", 3, "alpha: 5 nodes were asked for"),
    _bad("segment 5", 3, "net: segment 5 is out of range"),
    _bad("bandwidth 2gbit", 3, "net: 2000 Mbit/s were asked for on alpha-beta, which has 1000 Mbit/s"),
]


def test_what_a_user_types(grid: Grid, capsys: pytest.CaptureFixture[str]) -> None:
    said = grid.say(
        "reserve", "--nodes", "alpha:2,beta:3", "--bandwidth", "600mbit", "--walltime", "1h", "--id", "one"
    )
    assert said.returncode == 0, said.stderr
    assert "reservation one stands" in said.stdout
    assert "segment 1000" in said.stdout

    said = grid.say(
        "reserve", "--nodes", "alpha:1,beta:2", "--bandwidth", "600mbit", "--walltime", "1h", "--id", "two"
    )
    assert said.returncode == 3
    assert "beta: 2 nodes were asked for, and 1 is free" in said.stderr
    assert "net: 600 Mbit/s were asked for on alpha-beta, and 400 Mbit/s are left" in said.stderr
    assert "hint: all could from 20" in said.stderr

    listed = json.loads(grid.say("reservation", "list", "--json").stdout)
    assert [(one["id"], one["state"]) for one in listed] == [("one", "COMMITTED"), ("two", "RELEASED")]
    shown = json.loads(grid.say("reservation", "show", "one", "--json").stdout)
    assert {one["party"]: one["state"] for one in shown["parties"]} == dict.fromkeys(
        ("alpha", "beta", "net"), "COMMITTED"
    )
    assert json.loads(grid.say("site", "show", "beta", "--json").stdout)[0]["nodes_free"] == 1

    assert grid.say("reservation", "cancel", "one").returncode == 0
    assert grid.holds() == {}
    assert grid.say("reservation", "show", "three").returncode == 4

    for words, status, text in MORE_THAN_THERE_IS:
        said = grid.say("reserve", *words)
        assert (said.returncode, text in said.stderr) == (status, True), said.stderr
        assert grid.holds() == {}

    # Whatever is mistyped: one sentence, the exit status, and nothing is changed.
    before = grid.dump()
    for words, status, text in BAD:
        with pytest.raises(SystemExit) as left:
            app(["reserve", "--grc", grid.grc, *words], prog_name="virtgrid")
        out, err = capsys.readouterr()
        assert (left.value.code, text in err) == (status, True), err
        assert err.startswith("error: ")
        assert out == ""
    assert grid.dump() == before


def test_an_answer_that_does_not_come_is_not_taken_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The coordinator is killed between the question and the answer."""
    path = tmp_path / "grc.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def hang_up() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.recv(1)

        thread = threading.Thread(target=hang_up)
        thread.start()
        words = ["--nodes", "alpha:1", "--walltime", "1h", "--id", "mine", "--grc", f"unix:{path}"]
        with pytest.raises(SystemExit) as left:
            app(["reserve", *words], prog_name="virtgrid")
        thread.join()
    assert left.value.code == 7
    err = capsys.readouterr().err
    assert "it is not known yet what becomes of reservation mine" in err
    assert "hint: ask again: virtgrid reservation show mine" in err


async def test_killed_programs_leave_all_or_nothing_and_no_false_answer(grid: Grid, tmp_path: Path) -> None:
    rng = random.Random(7)
    told: dict[str, ReservationState | None] = {}
    done = asyncio.Event()

    async def use(number: int) -> None:
        """A user who reserves again and again, each time another hour."""
        turn = 0
        while not done.is_set():
            id_ = f"u{number}-{turn:03d}"
            sites = (SiteWish(site="alpha", nodes=1), SiteWish(site="beta", nodes=1))
            asked = wish(id_, sites=sites, window=soon(1 + turn, 1))
            told[id_] = None
            try:
                told[id_] = (await ask(RESERVE, asked.model_dump(mode="json"))).state
            except VirtgridError:
                await asyncio.sleep(0.1)
            turn += 1

    async def ask(method: str, params: dict[str, Any]) -> View:
        line = await dial(Endpoint.parse(grid.grc), nothing, name="the coordinator")
        try:
            return View.model_validate_json(json.dumps(await line.call(method, params, deadline_s=30)))
        finally:
            await line.close()

    async def until_more_are_told() -> None:
        before = len(told)
        await until(lambda: len(told) > before, timeout_s=120)

    async def until_listening(name: str) -> None:
        await until(lambda: grid.listens(name), timeout_s=120)

    users = [asyncio.create_task(use(number)) for number in range(3)]
    for name in ("grc", "alpha", "net", "grc", "beta", "grc"):
        await until_more_are_told()
        await asyncio.sleep(rng.random() * 0.2)
        grid.kill(name)
        grid.start(name)
        await until_listening(name)
    done.set()
    await asyncio.gather(*users)

    settled: dict[str, ReservationState | None] = {}
    open_ = {ReservationState.HOLDING, ReservationState.COMMITTING, ReservationState.RELEASING}
    async with asyncio.timeout(90):
        for id_ in told:
            while settled.get(id_, ReservationState.HOLDING) in open_:
                try:
                    settled[id_] = (await ask(SHOW, {"id": id_})).state
                except NotFoundError:
                    settled[id_] = None
                await asyncio.sleep(0.02)
    # A HOLD that was on its way when its coordinator was killed lapses by itself.
    expected = {id_: 3 for id_, state in settled.items() if state is ReservationState.COMMITTED}
    await until(lambda: {id_: len(states) for id_, states in grid.holds().items()} == expected, timeout_s=120)
    assert all(set(states) == {"COMMITTED"} for states in grid.holds().values())
    for id_, state in told.items():
        if state not in (None, *open_):
            assert settled[id_] is state, id_
    assert expected
    for name in ("alpha", "beta", "net"):
        with Database(tmp_path / f"{name}.db") as database:
            assert audit(database) == []

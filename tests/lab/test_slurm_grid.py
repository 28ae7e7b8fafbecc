"""Two sites over one Slurm, real programs: whoever is killed, a reservation stands everywhere or nowhere."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from grid_parts import soon, until

from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import VirtgridError
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.grc.coordinator import Coordinator, Timing
from virtgrid.grid.grc.parties import WireParty
from virtgrid.grid.messages.coalloc import ReservationState, Reserve, SiteWish
from virtgrid.grid.store.audit import audit
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.promises import Promises
from virtgrid.lab.slurm.cluster import CONTROLLER, Cluster
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint

pytestmark = pytest.mark.lab

VIRTGRID = (sys.executable, "-m", "virtgrid.cli.main")
NODES = {"alpha": ("n1", "n2"), "beta": ("n3", "n4")}
ME = "uid:0"
TIMING = Timing(ttl_s=12, hold_s=8.0, ask_s=4.0, answer_s=20.0, again_s=0.05, again_most_s=0.5, sweep_s=0.5)
SETTLED = {ReservationState.COMMITTED, ReservationState.RELEASED, ReservationState.OVER}


@dataclass
class Managers:
    """The sites' CRMs, each a process that can be killed and started again."""

    directory: Path
    cluster: Cluster
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def words(self, site: str) -> list[str]:
        here = self.directory
        nodes = [word for node in NODES[site] for word in ("--node", node)]
        return [
            "serve", "crm", "--site", site, *nodes, "--backend", "slurm",
            "--slurm-conf", str(self.cluster.configuration), "--key", str(here / "key"),
            "--spool", str(self.cluster.directory / f"spool-{site}"),
            "--addresses", {"alpha": "10.77.1.0/24", "beta": "10.77.2.0/24"}[site],
            "--socket", f"unix:{here}/{site}.sock", "--pilots", f"unix:{here}/{site}-pilots.sock",
            "--database", str(here / f"{site}.db"),
        ]  # fmt: skip

    def start(self, site: str) -> None:
        with (self.directory / f"{site}.log").open("ab") as log:
            self.running[site] = subprocess.Popen([*VIRTGRID, *self.words(site)], stderr=log)

    def kill(self, site: str) -> None:
        self.running[site].kill()
        self.running.pop(site).wait()

    def ready(self, site: str) -> int:
        """How often it has come up so far."""
        log = self.directory / f"{site}.log"
        return log.read_text().count("ready at") if log.exists() else 0

    def end(self) -> None:
        for site in list(self.running):
            self.kill(site)

    def reserved(self) -> dict[str, frozenset[str]] | None:
        """Of each of our reservations at Slurm the nodes; None while Slurm does not answer."""
        told = self.cluster.say("scontrol", "--oneliner", "show", "reservation")
        if told.returncode != 0:
            return None
        found = {}
        for line in told.stdout.splitlines():
            if named := re.match(r"ReservationName=(vg_\S+) .* Nodes=(\S+) ", line):
                found[named[1]] = frozenset(named[2].split(","))
        return found


@pytest.fixture
def managers(tmp_path: Path) -> Iterator[Managers]:
    seal.write_private(tmp_path / "key", seal.private_text(seal.new_key()))
    with Cluster() as cluster:
        made = Managers(tmp_path, cluster)
        try:
            yield made
        finally:
            made.end()


async def test_killed_programs_leave_all_or_nothing_at_slurm(managers: Managers) -> None:
    rng = random.Random(5)
    for site in NODES:
        managers.start(site)
    await until(lambda: all(managers.ready(site) for site in NODES), timeout_s=120)
    answers: dict[str, ReservationState | None] = {}
    done = asyncio.Event()
    with Database(managers.directory / "grc.db") as database:
        async with Coordinator(
            database=database,
            sites={site: WireParty(site, Endpoint(managers.directory / f"{site}.sock")) for site in NODES},
            network=None,
            clock=SystemClock(),
            timing=TIMING,
        ) as coordinator:

            async def use(number: int) -> None:
                turn = 0
                while not done.is_set():
                    id_ = f"u{number}-{turn:03d}"
                    sites = tuple(SiteWish(site=site, nodes=1) for site in NODES)
                    answers[id_] = None
                    try:
                        # Two users want the same hours.
                        wish = Reserve(id=id_, window=soon(1 + turn, 0.9), sites=sites)
                        answers[id_] = (await coordinator.reserve(wish, owner=ME)).state
                    except VirtgridError:
                        await asyncio.sleep(0.1)
                    turn += 1

            async def until_more_is_answered() -> None:
                before = sum(state is not None for state in answers.values())
                await until(
                    lambda: sum(state is not None for state in answers.values()) > before, timeout_s=120
                )

            users = [asyncio.create_task(use(number)) for number in range(2)]
            for name in (CONTROLLER, "alpha", CONTROLLER, "beta"):
                await until_more_is_answered()
                await asyncio.sleep(rng.random() * 0.2)
                if name == CONTROLLER:
                    managers.cluster.kill(CONTROLLER)
                    managers.cluster.start(CONTROLLER)
                    await asyncio.to_thread(managers.cluster.wait_answering)
                else:
                    times = managers.ready(name)
                    managers.kill(name)
                    managers.start(name)
                    await until(lambda name=name, times=times: managers.ready(name) > times, timeout_s=120)
            await until_more_is_answered()
            done.set()
            await asyncio.gather(*users)

            async def states() -> dict[str, ReservationState]:
                found = {}
                for id_ in answers:
                    try:
                        found[id_] = (await coordinator.show(id_, owner=ME)).state
                    except VirtgridError:
                        found[id_] = ReservationState.RELEASED
                return found

            async with asyncio.timeout(120):
                while not set((now := await states()).values()) <= SETTLED:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
    for id_, state in answers.items():
        if state in SETTLED:
            assert now[id_] is state, id_
    stand = [id_ for id_, state in now.items() if state is ReservationState.COMMITTED]
    assert stand
    # What lapses by itself has been swept up, and what Slurm forgot is there again.
    await until(lambda: len(managers.reserved() or ()) == 2 * len(stand), timeout_s=120, pause_s=0.2)
    reserved = managers.reserved()
    assert reserved is not None
    for site, nodes in NODES.items():
        with Database(managers.directory / f"{site}.db") as database:
            assert audit(database) == []
            expected = {f"vg_{site}_{key}": set(granted) for key, granted in _kept(database).items()}
        ours = {name: set(has) for name, has in reserved.items() if name.startswith(f"vg_{site}_")}
        assert ours == expected
        assert len(ours) == len(stand)
        assert all(has <= set(nodes) for has in ours.values())


def _kept(database: Database) -> dict[str, tuple[str, ...]]:
    stock = SiteStock(nodes=["n1"], ranges=["10.77.1.0/24"])
    return {one.key: one.grant.nodes for one in Promises(database, "site", stock).standing(int(time.time()))}

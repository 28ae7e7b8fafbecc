"""What every backend of a CRM must keep: the contract of ``virtgrid.grid.crm.backend.Backend``.

A backend is added to ``case`` and has to pass as it is.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from wire_ends import until

from virtgrid.core.errors import RefusedError
from virtgrid.grid.crm.backend import Backend, NodesPromised, PilotOrder
from virtgrid.grid.crm.embedded import Embedded
from virtgrid.grid.crm.slurm.backend import SlurmBackend
from virtgrid.grid.crm.slurm.tools import Slurm
from virtgrid.grid.messages.coalloc import Window
from virtgrid.lab.slurm.cluster import Cluster
from virtgrid.wire.endpoint import Endpoint

#: A pilot that does nothing but say that it is there, and ends when told to, or not.
PILOT = """
import pathlib, signal, sys, time
place = pathlib.Path(sys.argv[sys.argv.index("--ticket") + 1]).parent
assert (place / "ticket").stat().st_mode & 0o777 == 0o600
text = (place / "ticket").read_text()
if text.startswith("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(text, flush=True)
time.sleep(0.0 if text.startswith("brief") else 1000)
"""


@dataclass
class Case:
    """A backend with nodes n1 and n2, and who runs its pilots."""

    make: Callable[[], Backend]
    backend: Backend
    account: str
    log: Callable[[PilotOrder], str]

    def order(self, node: str = "n1", ticket: str = "ticket", hold: str = "") -> PilotOrder:
        now_s = int(time.time())
        return PilotOrder(
            hold=hold or secrets.token_urlsafe(18),
            reservation="r1",
            node=node,
            sandbox=f"{node}-box",
            account=self.account,
            ticket=ticket,
            crm=Endpoint(Path("/nowhere")),
            window=Window(begins_at_s=now_s - 1, ends_at_s=now_s + 600),
        )

    async def until_running(self, order: PilotOrder, *sandboxes: str) -> None:
        async with asyncio.timeout(30):
            while await self.backend.running(order.hold) != frozenset(sandboxes):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def embedded(directory: Path) -> AsyncIterator[Case]:
    account = pwd.getpwnam("nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name)
    # Where everybody may enter: pytest's own directories are their owner's.
    place = Path(f"/tmp/vgp{os.getpid()}-{secrets.token_hex(3)}")

    def make() -> Embedded:
        return Embedded(
            nodes=["n1", "n2"], host=Endpoint(Path("/nowhere")), directory=place,
            program=(sys.executable, "-c", PILOT), kill_after_s=0.5,
        )  # fmt: skip

    def log(order: PilotOrder) -> str:
        return (place / order.hold / order.sandbox / "log").read_text()

    made = make()
    try:
        yield Case(make, made, account.pw_name, log)
    finally:
        for hold in await made.holds():
            await made.withdraw(hold)
        await made.close()
        place.rmdir()  # noqa: ASYNC240


@asynccontextmanager
async def slurm(cluster: Cluster) -> AsyncIterator[Case]:
    place = cluster.directory / f"pilots-{secrets.token_hex(3)}"

    def make() -> SlurmBackend:
        return SlurmBackend(
            site=f"s{place.name[-6:]}", nodes=["n1", "n2"], host=Endpoint(Path("/nowhere")),
            slurm=Slurm(cluster.configuration), directory=place, program=(sys.executable, "-c", PILOT),
        )  # fmt: skip

    def log(order: PilotOrder) -> str:
        path = place / order.hold / order.sandbox / "log"
        return path.read_text() if path.exists() else ""

    made = make()
    try:
        yield Case(make, made, "nobody", log)
    finally:
        for hold in await made.holds():
            await made.withdraw(hold)
        await made.close()
        if place.exists():
            place.rmdir()


@pytest.fixture(params=["embedded", pytest.param("slurm", marks=pytest.mark.lab)])
async def case(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Case]:
    whose = embedded(tmp_path) if request.param == "embedded" else slurm(request.getfixturevalue("slurm"))
    async with whose as made:
        yield made


def _promised(order: PilotOrder, *nodes: str) -> NodesPromised:
    return NodesPromised(
        hold=order.hold, reservation=order.reservation, nodes=nodes or (order.node,), window=order.window
    )


async def test_nodes_are_told_in_their_order(case: Case) -> None:
    assert [node.name for node in await case.backend.nodes()] == ["n1", "n2"]


async def test_a_promise_can_be_repeated_and_withdrawn_and_a_node_nobody_has_is_refused(case: Case) -> None:
    order = case.order()
    for _ in range(2):
        await case.backend.promise(_promised(order))
    for _ in range(2):
        await case.backend.withdraw(order.hold)
    assert order.hold not in await case.backend.holds()
    with pytest.raises(RefusedError):
        await case.backend.promise(_promised(order, "n9"))


async def test_a_pilot_is_started_once_with_its_ticket_and_found_by_another_process(case: Case) -> None:
    order = case.order(ticket="the words of the ticket")
    await case.backend.promise(_promised(order))
    for _ in range(3):
        await case.backend.start([order])
    await case.until_running(order, order.sandbox)
    await until(lambda: "the words of the ticket" in case.log(order), timeout_s=30, pause_s=0.02)
    assert case.log(order).count("the words") == 1
    again = case.make()  # a CRM that was restarted
    assert await again.running(order.hold) == {order.sandbox}
    assert order.hold in await again.holds()
    await again.withdraw(order.hold)
    assert await case.backend.running(order.hold) == frozenset()
    assert order.hold not in await case.backend.holds()


async def test_a_pilot_that_has_ended_is_started_again(case: Case) -> None:
    order = case.order(ticket="brief")
    await case.backend.promise(_promised(order))
    for times in (1, 2):
        await case.backend.start([order])
        await case.until_running(order)
        assert case.log(order).count("brief") == times


@pytest.mark.parametrize("manner", ["willing", "stubborn"])
async def test_a_pilot_that_is_told_to_end_ends_whether_or_not_it_listens(case: Case, manner: str) -> None:
    order = case.order(ticket=manner)
    other = case.order("n2", hold=order.hold)
    await case.backend.promise(_promised(order, "n1", "n2"))
    await case.backend.start([order, other])
    await until(lambda: manner in case.log(order), timeout_s=30, pause_s=0.02)
    for _ in range(2):
        await case.backend.stop(order.hold, [order.sandbox])
    await case.until_running(order, other.sandbox)
    used = {one.sandbox: one.elapsed_s for one in await case.backend.usage(order.hold)}
    assert used.keys() == {order.sandbox, other.sandbox}
    assert all(0 <= elapsed_s < 60 for elapsed_s in used.values())


async def test_what_nobody_knows_is_neither_running_nor_stopped_nor_used(case: Case) -> None:
    assert await case.backend.running("nobody-knows-this") == frozenset()
    assert await case.backend.usage("nobody-knows-this") == ()
    await case.backend.stop("nobody-knows-this", ["n1-box"])
    await case.backend.withdraw("nobody-knows-this")


async def test_a_user_the_site_does_not_have_is_refused(case: Case) -> None:
    order = replace(case.order(), account="vg-no-such-user")
    await case.backend.promise(_promised(order))
    with pytest.raises(RefusedError, match="vg-no-such-user"):
        await case.backend.start([order])


async def test_what_is_wrong_with_a_host_is_told_in_sentences(tmp_path: Path) -> None:
    socket = tmp_path / "host.sock"
    backend = Embedded(nodes=["n1"], host=Endpoint(socket), directory=tmp_path / "pilots")
    assert await backend.problems() == (
        f"virtgridd is not at unix:{socket} (No such file or directory): no sandbox can be made",
    )
    async with await asyncio.start_unix_server(lambda _, writer: writer.close(), socket):
        assert await backend.problems() == ()
    (tmp_path / "pilots").rmdir()
    assert any("no pilot can be started" in one for one in await backend.problems())

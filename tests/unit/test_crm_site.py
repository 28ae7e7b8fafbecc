"""A site with pilots: real NodeManagers over sockets, on hosts that are scripts, and whoever is killed."""

from __future__ import annotations

import pwd
import time
from pathlib import Path

import pytest
from crew_parts import GRC, KEY, USER, placed
from grid_parts import until

from tests.unit.scripted_host import KEYS, ScriptedHost
from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import NotFoundError, PeerUnreachableError, RefusedError
from virtgrid.grid.crm.crew import STARTS_LIMIT
from virtgrid.grid.messages import job as jobs
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.coalloc import PROBLEMS_MAX, AskOffer, Hold, Nodes, Window
from virtgrid.grid.messages.job import AskCrew, Dismiss, Equip, Launch, Muster, Order
from virtgrid.grid.messages.node import Exec, HostEntry, State
from virtgrid.grid.node import uplink
from virtgrid.grid.node.manager import NodeManager
from virtgrid.grid.node.record import Store
from virtgrid.grid.node.uplink import Uplink
from virtgrid.grid.store.crews import Crews
from virtgrid.wire.endpoint import Endpoint


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redialling soon, and pilots that are the user's."""
    monkeypatch.setattr(uplink, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(uplink, "_LONGEST_WAIT_S", 0.05)
    monkeypatch.setattr("virtgrid.wire.line.Line.peer_uid", lambda _: pwd.getpwnam(USER).pw_uid)


PROGRAM = Exec(argv=("true",))


async def test_a_crew_from_its_muster_to_its_end(tmp_path: Path) -> None:
    async with placed(tmp_path) as place:
        await place.committed()
        for _ in range(2):
            await place.muster()
        view = await place.until(State.HOST_READY)
        assert [node.address for node in view.nodes] == ["10.1.0.1", "10.1.0.2"]
        assert [node.node for node in view.nodes] == ["n1", "n2"]
        assert len({node.sandbox for node in view.nodes}) == 2
        await place.equip()
        await place.until(State.RUNNING)
        for _ in range(2):
            await place.say(Order.LAUNCH, program=PROGRAM)
        await until(lambda: "exec" in place.first.done)
        place.first.writes(b"hello")
        place.first.exits(3)
        await place.until_written("hello", "3")
        for _ in range(2):
            await place.say(Order.DISMISS)
        view = await place.until_gone()
        assert view.used_s == 4.0
        for host in place.backend.hosts.values():
            assert host.done.count("prepare") == host.done.count("set_keys") == host.done.count("start") == 1
            assert host.done[-1] == "remove"
        assert place.first.done.count("exec") == 1
        await place.site.release(KEY, owner=GRC)
        with pytest.raises(NotFoundError):
            await place.view()
        assert Crews(place.database).all() == []
        assert place.backend.promised == set()


async def test_what_is_wrong_with_the_hosts_is_part_of_the_offer(tmp_path: Path) -> None:
    async with placed(tmp_path) as place:
        now_s = int(time.time())
        asked = AskOffer(window=Window(begins_at_s=now_s + 60, ends_at_s=now_s + 120), prefix=30)
        assert (await place.site.offer(asked)).problems == ()
        place.backend.told_problems = tuple(f"node n{number}: {'x' * 400}" for number in range(40))
        told = (await place.site.offer(asked)).problems
        assert len(told) == PROBLEMS_MAX
        assert all(len(one) <= 300 for one in told)
        assert told[-1] == f"and {40 - PROBLEMS_MAX + 1} more"


@pytest.mark.parametrize("step", ["mustered", "equipped", "launched", "running", "dismissed"])
async def test_a_crm_that_is_killed_goes_on_and_loses_no_output(tmp_path: Path, step: str) -> None:
    async with placed(tmp_path) as place:

        async def here(now: str) -> None:
            if now == step:
                await place.again()

        await place.committed()
        await place.muster()
        await here("mustered")
        await place.equip()
        await here("equipped")
        await place.until(State.RUNNING)
        await place.say(Order.LAUNCH, program=PROGRAM)
        await here("launched")
        await until(lambda: "exec" in place.first.done)
        place.first.writes(b"before")
        await place.until_written("before")
        await here("running")
        place.first.writes(b"after")
        place.first.exits(0)
        await place.until_written("before", "after", "0")
        await place.say(Order.DISMISS)
        await here("dismissed")
        await place.until_gone()
        assert place.first.done.count("exec") == 1
        await place.site.release(KEY, owner=GRC)
        assert place.backend.promised == set()


async def test_a_pilot_that_is_killed_is_started_again_and_goes_on(tmp_path: Path) -> None:
    async with placed(tmp_path) as place:
        await place.committed()
        await place.muster()
        view = await place.until(State.HOST_READY)
        place.backend.kill(view.nodes[1].sandbox)
        await place.equip()
        await place.until(State.RUNNING)
        place.backend.kill(view.nodes[1].sandbox)
        await place.say(Order.DISMISS)
        await place.until_gone()
        assert all(host.done[-1] == "remove" for host in place.backend.hosts.values())


async def test_pilots_that_end_again_and_again_are_given_up(tmp_path: Path) -> None:
    async with placed(tmp_path) as place:
        place.backend.brief = True
        await place.committed()
        await place.muster()
        view = await place.eventually(lambda view: all(node.problem for node in view.nodes))
        assert view.nodes[0].problem == f"its pilot ended {STARTS_LIMIT} times"
        assert place.backend.starts == 2 * STARTS_LIMIT
        await place.say(Order.DISMISS)
        await place.until_gone()


async def test_a_pilot_that_never_dials_in_is_given_up_and_ended(tmp_path: Path) -> None:
    async with placed(tmp_path, awaited_s=0.2, gone_s=0.2) as place:
        place.backend.mute = True
        await place.committed()
        await place.muster()
        view = await place.eventually(lambda view: all(node.problem for node in view.nodes))
        assert view.nodes[0].problem == "its pilot did not dial in within 0.2 s"
        await place.say(Order.DISMISS)
        await place.until_gone()
        assert await place.backend.running(KEY) == frozenset()


async def test_nodes_are_given_back_only_when_no_sandbox_is_left_on_them(tmp_path: Path) -> None:
    async with placed(tmp_path, gone_s=1000.0) as place:
        await place.committed()
        await place.muster()
        await place.until(State.HOST_READY)
        gates = [host.hold("remove") for host in place.backend.hosts.values()]
        with pytest.raises(PeerUnreachableError, match="are not gone yet"):
            await place.site.release(KEY, owner=GRC)
        assert await place.stored.keeps(KEY)
        for gate in gates:
            gate.set()
        await place.until_gone()
        await place.site.release(KEY, owner=GRC)
        assert not await place.stored.keeps(KEY)


async def test_a_hold_that_keeps_nothing_any_more_has_no_crew(tmp_path: Path) -> None:
    async with placed(tmp_path) as place:
        await place.committed()
        await place.muster()
        await place.until(State.HOST_READY)
        await place.stored.release(KEY, owner=GRC)  # as its window's end does
        await place.until_gone()
        await place.site.sweep()
        with pytest.raises(NotFoundError):
            await place.view()
        assert place.backend.promised == set()


async def test_what_a_backend_refuses_is_not_held_and_what_a_crash_left_there_is_withdrawn(
    tmp_path: Path,
) -> None:
    async with placed(tmp_path) as place:
        now_s = int(time.time())
        hold = Hold(
            key=KEY, reservation="r1", window=Window(begins_at_s=now_s, ends_at_s=now_s + 600), ttl_s=60,
            asked_at_s=now_s, wanted=Nodes(nodes=2, addresses="10.1.0.0/28"),
        )  # fmt: skip
        place.backend.unwilling = True
        answer = await place.site.hold(hold, owner=GRC)
        assert answer.refusal is not None
        assert answer.refusal.why == "node n1 is down"
        assert not await place.stored.keeps(KEY)
        place.backend.promised.add("of-nobody-at-all")
        await place.site.sweep()
        assert place.backend.promised == set()


@pytest.mark.parametrize(
    ("user", "owner", "words"),
    [
        ("vg-nobody-here", GRC, "alpha has no account 'vg-nobody-here'"),
        (USER, "uid:12345", "uid:12345 may not muster a crew for nobody"),
    ],
)
async def test_a_crew_is_mustered_for_a_user_of_the_site_by_who_may(
    tmp_path: Path, user: str, owner: str, words: str
) -> None:
    async with placed(tmp_path) as place:
        now_s = int(time.time())
        hold = Hold(
            key=KEY, reservation="r1", window=Window(begins_at_s=now_s, ends_at_s=now_s + 600), ttl_s=60,
            asked_at_s=now_s, wanted=Nodes(nodes=1, addresses="10.1.0.0/28"),
        )  # fmt: skip
        await place.site.hold(hold, owner=owner)
        asked = Muster(key=KEY, user=user, tag=7, prefix=28)
        with pytest.raises(RefusedError, match="is HELD"):
            await place.site.answer(asked, Order.MUSTER, owner)
        await place.site.commit(KEY, owner=owner)
        with pytest.raises(RefusedError, match=words):
            await place.site.answer(asked, Order.MUSTER, owner)
        with pytest.raises(NotFoundError):
            await place.site.answer(asked, Order.MUSTER, "uid:777")
        assert Crews(place.database).all() == []


async def test_a_crew_is_its_coordinator_s_alone(tmp_path: Path) -> None:
    async with placed(tmp_path) as place:
        await place.committed()
        await place.muster()
        with pytest.raises(RefusedError, match="mustered otherwise"):
            await place.say(Order.MUSTER, user=USER, tag=8, prefix=28)
        for asked, method in (
            (
                Equip(key=KEY, hosts=(HostEntry(hostname="x", address="10.1.0.1", **KEYS.model_dump()),)),
                Order.EQUIP,
            ),
            (Launch(key=KEY, program=PROGRAM), Order.LAUNCH),
            (Dismiss(key=KEY), Order.DISMISS),
            (AskCrew(key=KEY), jobs.CREW),
        ):
            with pytest.raises(NotFoundError):
                await place.site.answer(asked, method, "uid:777")


async def test_a_pilot_whose_ticket_nobody_waits_for_is_refused(tmp_path: Path) -> None:
    async with placed(tmp_path) as place:
        ticket = tickets.Ticket(
            id=tickets.new_id(), reservation="r1", sandbox="n1-x", uid=pwd.getpwnam(USER).pw_uid,
            begins_at_s=time.time(), ends_at_s=time.time() + 60, memory_bytes=256 << 20,
        )  # fmt: skip
        manager = NodeManager(
            ticket=ticket, host=ScriptedHost(), store=Store(tmp_path / "stray"), clock=SystemClock()
        )
        assert not await Uplink(manager, Endpoint(tmp_path / "p"), tickets.issue(ticket, place.key)).run()
        assert manager.state is State.DONE
        await manager.close()

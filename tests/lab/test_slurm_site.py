"""A site over a real Slurm: what it looks at before it promises, and what a crash of anybody leaves."""

from __future__ import annotations

import asyncio
import pwd
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import slurm_parts
from slurm_parts import Made

from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import DeadlineError, NotFoundError, PeerUnreachableError, RefusedError
from virtgrid.grid.crm.backend import NodesPromised, PilotOrder
from virtgrid.grid.crm.slurm.backend import SlurmBackend
from virtgrid.grid.crm.slurm.tools import Slurm
from virtgrid.grid.messages.coalloc import AskOffer, Hold, HoldState, Nodes, Window
from virtgrid.lab.slurm.cluster import CONTROLLER, Cluster
from virtgrid.wire.endpoint import Endpoint

pytestmark = pytest.mark.lab
ME = "uid:0"


@pytest.fixture
async def made(slurm: Cluster, tmp_path: Path) -> AsyncIterator[Made]:
    async with slurm_parts.site(tmp_path, slurm, clock=FakeClock(datetime.now(UTC))) as one:
        yield one


@pytest.fixture
def mended(slurm: Cluster) -> Iterator[Cluster]:
    """For a test that breaks something: mended afterwards. Asked for before ``made``, which ends first."""
    yield slurm
    for node in slurm.nodes:
        slurm.say("scontrol", "update", f"NodeName={node}", "State=RESUME")
    slurm.wait_idle()


def asked(made: Made, key: str = "key-0001", *, nodes: int = 1, begins_s: int = 3600) -> Hold:
    now_s = int(made.clock.utc().timestamp())
    return Hold(
        key=key,
        reservation="r1",
        window=Window(begins_at_s=now_s + begins_s, ends_at_s=now_s + begins_s + 1800),
        ttl_s=30,
        asked_at_s=now_s,
        wanted=Nodes(nodes=nodes, addresses="10.1.0.0/29"),
    )


async def grant(made: Made, hold: Hold) -> tuple[str, ...]:
    answer = await made.site.hold(hold, owner=ME)
    assert answer.standing is not None, answer.refusal
    return answer.standing.grant.nodes


async def refusal(made: Made, hold: Hold) -> str:
    answer = await made.site.hold(hold, owner=ME)
    assert answer.refusal is not None, answer.standing
    return answer.refusal.why


# -- before the promise --------------------------------------------------------------------------


async def test_a_node_that_is_away_is_not_promised_and_the_refusal_says_why(
    mended: Cluster, made: Made
) -> None:
    mended.say("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=disk | broken", check=True)
    assert await grant(made, asked(made, nodes=1)) == ("n2",)
    why = await refusal(made, asked(made, "key-0002", nodes=2, begins_s=10_000))
    assert why.startswith("2 nodes were asked for, and 1 is free (n1 is drain")
    assert "disk | broken" in why
    offer = await made.site.offer(AskOffer(window=asked(made, begins_s=10_000).window, prefix=30))
    assert (offer.nodes, offer.nodes_free) == (2, 1)


async def test_a_node_that_goes_between_hold_and_commit_is_not_promised(mended: Cluster, made: Made) -> None:
    (node,) = await grant(made, asked(made))
    mended.say("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=burnt", check=True)
    with pytest.raises(RefusedError, match=f"cannot be had any more: node {node}: is down: burnt"):
        await made.site.commit("key-0001", owner=ME)
    assert (await made.site.status("key-0001", owner=ME)).state is HoldState.RELEASED
    await made.site.sweep()
    assert made.reservations() == []


async def test_a_node_that_goes_after_the_promise_takes_nothing_back(mended: Cluster, made: Made) -> None:
    (node,) = await grant(made, asked(made))
    await made.site.commit("key-0001", owner=ME)
    mended.say("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=burnt", check=True)
    assert (await made.site.commit("key-0001", owner=ME)).state is HoldState.COMMITTED
    await made.site.sweep()
    assert made.reservations() == [f"vg_{made.name}_key-0001"]


async def test_what_is_somebody_elses_at_slurm_is_not_promised_and_the_nearest_window_is_true(
    made: Made, slurm: Cluster
) -> None:
    hold = asked(made, nodes=2)
    begins, ends = (
        datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        for at_s in (hold.window.begins_at_s, hold.window.ends_at_s)
    )
    other = f"other-{made.name}"
    slurm.say(
        "scontrol", "create", "reservation", f"ReservationName={other}", f"StartTime={begins}",
        f"EndTime={ends}", "Nodes=n2", "Users=root", check=True,
    )  # fmt: skip
    try:
        answer = await made.site.hold(hold, owner=ME)
        assert answer.refusal is not None
        assert f"n2 Slurm's reservation {other}" in answer.refusal.why
        nearest = answer.refusal.nearest[0]
        # After it, or before it with the guard time between.
        assert nearest.begins_at_s in (hold.window.ends_at_s, hold.window.begins_at_s - 1860)
        moved = hold.model_copy(update={"window": nearest, "key": "key-0002"})
        assert await grant(made, moved) == ("n1", "n2")
    finally:
        slurm.say("scontrol", "delete", f"ReservationName={other}", check=True)


async def test_a_job_that_will_not_have_ended_keeps_its_node(made: Made, slurm: Cluster) -> None:
    submitted = slurm.say(
        "sbatch", "--parsable", "--nodelist=n1", "--time=300", "--wrap=exec sleep 1000",
        "--output=/dev/null", "--chdir=/", check=True,
    )  # fmt: skip
    job = submitted.stdout.strip()
    try:
        slurm.wait_job(job, "RUNNING")
        assert f"n1 Slurm's job {job}" in await refusal(made, asked(made, nodes=2))
        assert await grant(made, asked(made, "key-0002", nodes=1)) == ("n2",)
    finally:
        slurm.say("scancel", job, check=True)
        slurm.wait_idle()


async def test_a_reservation_is_longer_than_its_window_by_the_guard_time(made: Made, slurm: Cluster) -> None:
    hold = asked(made)
    await grant(made, hold)
    told = slurm.say("scontrol", "--oneliner", "show", "reservation", f"vg_{made.name}_key-0001").stdout
    ends = datetime.fromtimestamp(hold.window.ends_at_s + 60, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    assert f"EndTime={ends}" in told
    assert "Users=root " in told


# -- a crash of anybody --------------------------------------------------------------------------


async def test_a_manager_that_was_killed_finds_its_holds_and_sweeps_up_what_nobody_holds(
    slurm: Cluster, tmp_path: Path
) -> None:
    clock, name = FakeClock(datetime.now(UTC)), slurm_parts.new_name()
    async with slurm_parts.site(tmp_path, slurm, clock=clock, name=name, ends=False) as before:
        await grant(before, asked(before, "key-held"))
        await grant(before, asked(before, "key-kept", begins_s=10_000))
        await before.site.commit("key-kept", owner=ME)
        # Killed after Slurm was asked and before it was written down, or with another file: nobody knows it.
        window = asked(before, begins_s=20_000).window
        lost = NodesPromised(hold="key-lost", reservation="r1", nodes=("n1",), window=window)
        await before.backend.promise(lost)
    async with slurm_parts.site(tmp_path, slurm, clock=clock, name=name) as after:
        await after.site.sweep()
        assert after.reservations() == [f"vg_{name}_key-held", f"vg_{name}_key-kept"]
        assert (await after.site.commit("key-held", owner=ME)).state is HoldState.COMMITTED
        await after.site.release("key-held", owner=ME)
        assert after.reservations() == [f"vg_{name}_key-kept"]
        clock.advance(20_000)
        await after.site.sweep()
        assert after.reservations() == []
        with pytest.raises(NotFoundError):
            await after.site.commit("key-lost", owner=ME)


async def test_what_slurm_forgets_is_reserved_again(made: Made, slurm: Cluster) -> None:
    """A slurmctld that is killed forgets what it answered a moment ago; an administrator may err as well."""
    name = f"vg_{made.name}_key-0001"
    await grant(made, asked(made))
    slurm.say("scontrol", "delete", f"ReservationName={name}", check=True)
    assert (await made.site.commit("key-0001", owner=ME)).state is HoldState.COMMITTED
    assert made.reservations() == [name]
    slurm.say("scontrol", "delete", f"ReservationName={name}", check=True)
    await made.site.sweep()
    assert made.reservations() == [name]


async def test_a_reservation_that_came_back_from_the_dead_is_not_in_the_way(
    made: Made, slurm: Cluster
) -> None:
    """A slurmctld that is killed also forgets what it withdrew a moment ago."""
    hold = asked(made, nodes=2)
    await grant(made, hold)
    await made.backend.withdraw(hold.key)
    dead = NodesPromised(hold="key-dead", reservation="r0", nodes=("n1", "n2"), window=hold.window)
    await made.backend.promise(dead)
    assert (await made.site.commit(hold.key, owner=ME)).state is HoldState.COMMITTED
    assert made.reservations() == [f"vg_{made.name}_{hold.key}"]


async def test_a_controller_that_is_killed_between_hold_and_commit_delays_and_loses_nothing(
    tmp_path: Path,
) -> None:
    # Of its own: reservations of other tests would come back from the dead.
    with Cluster(["n1", "n2"]) as cluster:
        async with slurm_parts.site(tmp_path, cluster, clock=FakeClock(datetime.now(UTC))) as made:
            await _killed_between_hold_and_commit(made, cluster)


async def _killed_between_hold_and_commit(made: Made, cluster: Cluster) -> None:
    await grant(made, asked(made, nodes=2))
    cluster.kill(CONTROLLER)
    quick = SlurmBackend(
        site=made.name, nodes=made.backend.names, host=Endpoint(Path("/nowhere")),
        slurm=Slurm(cluster.configuration, answer_s=0.5), directory=cluster.directory / f"pilots-{made.name}",
    )  # fmt: skip
    made.site._backend = quick
    try:
        with pytest.raises(PeerUnreachableError):
            await made.site.commit("key-0001", owner=ME)
        with pytest.raises(PeerUnreachableError):
            await made.site.hold(asked(made, "key-0002", begins_s=10_000), owner=ME)
        await made.site.sweep()  # says so, and goes on
    finally:
        cluster.start(CONTROLLER)
    made.site._backend = made.backend
    cluster.wait_answering()
    async with asyncio.timeout(60):
        while True:
            try:
                standing = await made.site.commit("key-0001", owner=ME)
                break
            except PeerUnreachableError:  # it has not heard of its nodes yet
                await asyncio.sleep(0.05)
    assert standing.state is HoldState.COMMITTED
    assert made.reservations() == [f"vg_{made.name}_key-0001"]


async def test_a_controller_that_hangs_is_said_to_and_the_same_hold_goes_on_afterwards(
    made: Made, slurm: Cluster
) -> None:
    hold = asked(made)
    tools = Slurm(slurm.configuration, answer_s=0.5)
    with slurm.frozen(CONTROLLER), pytest.raises(DeadlineError, match="Slurm did not answer within"):
        await tools.ask(["scontrol", "--oneliner", "show", "reservation"])
    slurm.wait_answering()
    assert await grant(made, hold) == ("n1",)
    assert await grant(made, hold) == ("n1",)


# -- pilots --------------------------------------------------------------------------------------


def order(made: Made, hold: Hold, **changed: object) -> PilotOrder:
    what = {
        "hold": hold.key,
        "reservation": hold.reservation,
        "node": "n1",
        "sandbox": "n1-box",
        "account": "nobody",
        "ticket": "the words of the ticket",
        "crm": Endpoint(Path("/nowhere")),
        "window": hold.window,
    }
    return PilotOrder(**{**what, **changed})  # type: ignore[arg-type]


async def test_only_the_account_of_the_hold_gets_in_and_only_it_reads_the_ticket(
    made: Made, slurm: Cluster
) -> None:
    hold = asked(made, begins_s=0)
    await grant(made, hold)
    await made.backend.start([order(made, hold)])
    reservation = f"vg_{made.name}_key-0001"
    denied = slurm.say("sbatch", "--uid=daemon", f"--reservation={reservation}", "--wrap=true", "--chdir=/")
    assert "Access denied to requested reservation" in denied.stderr
    jobs = slurm.say(
        "squeue", "--noheader", f"--reservation={reservation}", "--format=%i %u %N"
    ).stdout.split()
    slurm.wait_job(jobs[0], "RUNNING")
    assert jobs[1] == "nobody"
    told = slurm.say("scontrol", "show", "job", jobs[0], check=True).stdout
    told += slurm.say("scontrol", "write", "batch_script", jobs[0], "-", check=True).stdout
    assert "os.execv" in told
    assert "the words" not in told
    ticket = slurm.directory / f"pilots-{made.name}" / hold.key / "n1-box" / "ticket"
    assert (ticket.stat().st_mode & 0o777, ticket.owner()) == (0o600, "nobody")


async def test_a_pilot_is_not_started_on_a_node_that_went_away(mended: Cluster, made: Made) -> None:
    hold = asked(made, begins_s=0)
    await grant(made, hold)
    mended.say("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=burnt", check=True)
    with pytest.raises(RefusedError, match="node n1: is drained: burnt"):
        await made.backend.start([order(made, hold)])
    assert await made.backend.running(hold.key) == frozenset()


async def test_a_job_that_was_submitted_twice_is_one_pilot(made: Made, slurm: Cluster) -> None:
    """sbatch was given up, and had been heard all the same."""
    hold = asked(made, begins_s=0)
    await grant(made, hold)
    one = order(made, hold)
    await made.backend.start([one])
    await made.backend._submit(one, pwd.getpwnam("nobody"))
    await made.backend.start([one])
    jobs = await made.backend._jobs(hold.key)
    assert len(jobs) == 1
    assert await made.backend.running(hold.key) == {"n1-box"}


async def test_somebody_elses_job_of_our_name_is_none_of_ours(made: Made, slurm: Cluster) -> None:
    hold = asked(made, begins_s=0)
    await grant(made, hold)
    await made.backend.start([order(made, hold)])
    name = f"vg_{made.name}_key-0001_n1-box"
    submitted = slurm.say(
        "sbatch", "--parsable", "--uid=daemon", f"--job-name={name}", "--wrap=exec sleep 1000",
        "--begin=now+1hour", "--chdir=/", "--output=/dev/null", check=True,
    )  # fmt: skip
    job = submitted.stdout.strip()
    try:
        await made.backend.withdraw(hold.key)
        assert job in slurm.say("squeue", "--noheader", "--format=%i").stdout.split()
    finally:
        slurm.say("scancel", job)

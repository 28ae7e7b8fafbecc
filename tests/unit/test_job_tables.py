"""The tables of a job and of a crew, case by case; for interleavings see tests/property/test_job_life.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from virtgrid.core.errors import RefusedError
from virtgrid.grid.coalloc import crew
from virtgrid.grid.coalloc import job as table
from virtgrid.grid.coalloc.crew import Goal
from virtgrid.grid.coalloc.job import Event, Job
from virtgrid.grid.grc.place import common_prefix
from virtgrid.grid.messages.job import CrewView, JobState, NodeView, Order, Verdict
from virtgrid.grid.messages.node import Command, Keys, State
from virtgrid.grid.node import states

KEYS = Keys(user_key="ssh-ed25519 " + "u" * 68, host_key="ssh-ed25519 " + "h" * 68)
S = JobState


def node(name: str = "a1", **more: Any) -> NodeView:
    return NodeView(node=name, sandbox=f"{name}-x", address=f"10.0.0.{name[-1]}", **more)


def view(*nodes: NodeView, **more: Any) -> CrewView:
    return CrewView(version=1, nodes=nodes, **more)


def ready(name: str) -> CrewView:
    return view(node(name, state=State.HOST_READY, keys=KEYS))


def up(name: str) -> CrewView:
    return view(node(name, state=State.RUNNING, keys=KEYS))


def at(state: JobState) -> Job:
    """A job of two sites, by the way everything goes well."""
    now = table.begin(["a", "b"])
    for event in (Event.RESERVED, Event.BEGUN, Event.KEYED, Event.UP, Event.LAUNCHED, Event.FINISHED):
        if now.state is state:
            return now
        now = table.happened(now, event, str(event))
    return now if now.state is state else table.happened(now, Event.GONE, "gone")


def test_everybody_s_keys_and_then_everybody_s_sandbox_are_waited_for() -> None:
    now = table.heard(at(S.MUSTERING), "a", ready("a1"))
    assert now.state is S.MUSTERING
    now = table.heard(now, "b", ready("b2"))
    assert now.state is S.EQUIPPING
    assert [host.hostname for host in table.hosts(now)] == ["a1-x", "b2-x"]
    now = table.heard(now, "b", up("b2"))
    assert now.state is S.EQUIPPING
    assert table.late(now) == "a: a1 is HOST_READY"
    assert table.heard(now, "a", up("a1")).state is S.LAUNCHING


def test_a_coordinator_that_was_restarted_goes_on_when_all_run_already() -> None:
    now = table.heard(at(S.EQUIPPING), "a", up("a1"))
    assert not table.keyed(now)
    assert table.heard(now, "b", up("b2")).state is S.LAUNCHING


def test_the_program_is_started_at_the_first_site_only() -> None:
    now = at(S.LAUNCHING)
    assert table.order(now, "a") is Order.LAUNCH
    assert table.order(now, "b") is None
    assert table.told(now, "b", Order.LAUNCH).state is S.LAUNCHING
    assert table.told(now, "a", Order.MUSTER).state is S.LAUNCHING
    assert table.told(now, "a", Order.LAUNCH).state is S.RUNNING


@pytest.mark.parametrize("state", [S.MUSTERING, S.EQUIPPING, S.LAUNCHING, S.RUNNING])
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (view(node("b2", problem="no account")), "b: b2: no account"),
        (view(node("b2", state=State.FAILED, reason="no bridge")), "b: b2: FAILED: no bridge"),
        (view(node("b2"), gone=True), "b: its nodes were taken back"),
    ],
)
def test_a_node_that_breaks_ends_the_job_with_its_reason(state: JobState, bad: CrewView, why: str) -> None:
    now = table.heard(at(state), "b", bad)
    assert (now.state, now.verdict, now.reason) == (S.DISMISSING, Verdict.BROKEN, why)


@pytest.mark.parametrize("state", [one for one in S if one not in (S.DISMISSING, S.OVER)])
@pytest.mark.parametrize("event", [Event.CANCELLED, Event.ENDED, Event.BROKEN])
def test_whatever_ends_a_job_leads_to_giving_back(state: JobState, event: Event) -> None:
    now = table.happened(at(state), event, "why")
    assert now.state is S.DISMISSING
    for other in Event:
        if other is not Event.GONE:
            assert table.happened(now, other, "later") == now
    assert table.order(now, "a") is Order.DISMISS
    assert table.happened(now, Event.GONE, "gone").over


def test_an_exit_status_is_kept_also_when_it_comes_late_and_is_never_changed() -> None:
    now = table.happened(at(S.RUNNING), Event.CANCELLED, "by its user")
    now = table.finished(now, 143, None, None)
    assert (now.verdict, now.status, now.reason) == (Verdict.CANCELLED, 143, "by its user")
    assert table.finished(now, 0, None, None) == now
    lost = table.finished(at(S.RUNNING), None, None, "the NodeManager was restarted")
    assert (lost.verdict, lost.status) == (Verdict.FINISHED, None)
    assert lost.reason == "how the program ended is not known: the NodeManager was restarted"


def test_a_site_that_knows_nothing_has_nothing_left_once_it_is_to_be_so() -> None:
    assert table.unknown(at(S.RUNNING), "b").reason == "b: the nodes are not reserved any more"
    now = table.unknown(at(S.DISMISSING), "b")
    assert table.order(now, "b") is None
    assert not table.all_gone(now)
    assert table.all_gone(table.heard(now, "a", view(gone=True)))


def test_a_job_that_is_over_keeps_nothing_and_stays_over() -> None:
    over = at(S.OVER)
    assert all(table.happened(over, event, "late") == over for event in Event)
    assert all(table.order(over, site) is None for site in over.sites)


# -- a crew --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("goal", list(Goal))
def test_a_pilot_is_given_no_command_that_its_table_refuses(state: State, goal: Goal) -> None:
    command = crew.command(goal, state)
    if command is not None:
        assert states.after_command(state, command) is not state


def test_every_state_leads_to_the_goal() -> None:
    for goal, last in ((Goal.READY, State.HOST_READY), (Goal.UP, State.RUNNING), (Goal.GONE, State.DONE)):
        by_itself = {
            State.INITIATING: State.HOST_READY, State.STARTING_UP: State.RUNNING,
            State.SHUTTING_DOWN: State.DONE,
        }  # fmt: skip
        state = State.INITIAL
        while state is not last:
            command = crew.command(goal, state)
            state = by_itself[state] if command is None else states.after_command(state, command)


def test_a_goal_never_goes_back() -> None:
    assert crew.further(Goal.GONE, Goal.UP) is Goal.GONE
    assert crew.further(Goal.UP, Goal.READY) is Goal.UP
    assert crew.further(Goal.READY, Goal.GONE) is Goal.GONE
    assert Command.SHUT_DOWN in {crew.command(Goal.GONE, state) for state in State}


# -- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "prefix"),
    [
        (["10.77.1.0/29"], 29),
        (["10.77.1.0/29", "10.77.2.0/28"], 22),
        (["10.70.0.80/28", "10.70.1.80/28"], 23),
        (["10.0.0.0/30", "10.255.0.0/30"], 8),
    ],
)
def test_all_nodes_lie_in_one_network(ranges: list[str], prefix: int) -> None:
    assert common_prefix(ranges) == prefix


def test_ranges_with_nothing_in_common_are_refused_by_name() -> None:
    with pytest.raises(RefusedError, match=r"10.0.0.0/30, 192.168.0.0/30 lie in no common network"):
        common_prefix(["10.0.0.0/30", "192.168.0.0/30"])


def test_the_reference_shows_the_tables_as_they_are() -> None:
    text = (Path(__file__).parents[2] / "docs/reference/jobs.md").read_text(encoding="utf-8")
    assert table.markdown() in text
    assert crew.markdown() in text

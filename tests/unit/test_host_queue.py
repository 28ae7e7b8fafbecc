"""The queue of migrations: its table, its limits, what a restart finds, and that every entry ends once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtgrid.config import Config
from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.host import orders
from virtgrid.host.entries import KEPT, Entries
from virtgrid.host.queue import (
    ENDED,
    MEANING,
    TABLE,
    Entry,
    Event,
    Limits,
    Place,
    State,
    Step,
    after_attempt,
    decide,
    follow,
)
from virtgrid.migration.domainpolicy import DomainPolicy

LIMITS = Limits(
    here=3,
    places={"b": Place(slots=2, link="wan"), "c": Place(slots=2, link="wan"), "d": Place(slots=1)},
    links={"wan": 2},
    attempts=3,
    retry_s=10.0,
)


def entry(number: int, to: str = "b", state: State = State.QUEUED, **more: object) -> Entry:
    values: dict[str, object] = {
        "id": f"e{number}", "domain": f"web{number}", "uuid": f"u{number}", "to": to, "why": "a test",
        "asked_at_s": float(number), "since_s": 0.0, "state": state, **more,
    }  # fmt: skip
    return Entry.model_validate(values)


def test_every_state_is_explained_and_left_by_every_way_there_is() -> None:
    assert set(TABLE) == set(MEANING) == set(State)
    assert {state for state, ways in TABLE.items() if not ways} == ENDED
    reached = {state for ways in TABLE.values() for state in ways.values()}
    assert reached == set(State)


def test_what_cannot_happen_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="'arrived' cannot happen to web1 while it is queued"):
        follow(entry(1), Event.ARRIVED, 0.0, note="")


def test_first_come_first_served_within_the_slots_of_a_link() -> None:
    found = decide([entry(3), entry(1, "c"), entry(2), entry(4, "d"), entry(5, "d")], LIMITS, 0.0, {})
    assert found == [
        Step(id="e1", event=Event.STARTED, note=""),
        Step(id="e2", event=Event.STARTED, note=""),
        Step(id="e3", event=Event.HELD_BACK, note="2 migrations use link wan already"),
        Step(id="e4", event=Event.STARTED, note=""),
        Step(id="e5", event=Event.HELD_BACK, note="3 migrations leave this host already"),
    ]


def test_what_waits_for_the_same_is_not_told_again() -> None:
    going = entry(1, "d", State.RUNNING)
    waits = entry(2, "d", State.WAITING, note="1 migration go to d already")
    assert decide([going, waits], LIMITS, 0.0, {}) == [
        Step(id="e2", event=Event.HELD_BACK, note="1 migration goes to d already")
    ]
    waits = waits.model_copy(update={"note": "1 migration goes to d already"})
    assert decide([going, waits], LIMITS, 0.0, {}) == []


def test_somebody_else_s_migration_of_the_domain_is_waited_for() -> None:
    (step,) = decide([entry(1)], LIMITS, 0.0, {"u1": "20261127T1-web1"})
    assert (step.event, step.note) == (
        Event.HELD_BACK, "it is being migrated by somebody else (20261127T1-web1)"
    )  # fmt: skip


def test_a_destination_that_was_taken_out_is_no_destination() -> None:
    (step,) = decide([entry(1, "gone")], LIMITS, 0.0, {})
    assert step.event is Event.NO


def test_a_failed_attempt_waits_longer_each_time() -> None:
    now, one = 100.0, entry(1)
    waits = []
    for _ in range(2):
        one = follow(one, Event.STARTED, now, note="")
        one = follow(one, Event.BEGAN, now, note="")
        one = follow(one, after_attempt(one, 1, LIMITS.attempts), now, note="no", limits=LIMITS)
        waits.append(one.not_before_s - now)
        assert decide([one], LIMITS, now, {}) == []
        assert decide([one], LIMITS, one.not_before_s, {})
    assert waits == [10.0, 20.0]
    one = follow(follow(one, Event.STARTED, now, note=""), Event.BEGAN, now, note="")
    assert after_attempt(one, 1, LIMITS.attempts) is Event.ENOUGH


@pytest.mark.parametrize(
    ("status", "event"),
    [
        (1, Event.AGAIN), (2, Event.NO), (3, Event.AGAIN), (4, Event.WITHDRAWN), (5, Event.AGAIN),
        (6, Event.WITHDRAWN), (7, Event.NO), (8, Event.AGAIN), (130, Event.AGAIN),
    ],
)  # fmt: skip
def test_an_exit_status_says_whether_it_is_tried_again(status: int, event: Event) -> None:
    assert after_attempt(entry(1, state=State.RUNNING, attempts=1), status, 3) is event


@given(
    st.lists(st.tuples(st.sampled_from(["b", "c", "d", "gone"]), st.sampled_from(list(State))), max_size=24),
    st.data(),
)
def test_limits_hold_whatever_happens_and_all_ends(
    kinds: list[tuple[str, State]], data: st.DataObject
) -> None:
    """Worked off with workers that end as they like: never over a limit, and every entry ends."""
    all_ = {f"e{n}": entry(n, to, state) for n, (to, state) in enumerate(kinds)}
    before = {id_ for id_, one in all_.items() if one.state in (State.STARTING, State.RUNNING)}
    now = 0.0
    for _ in range(1000):
        active = [one for one in all_.values() if one.state not in ENDED]
        if not active:
            break
        for step in decide(active, LIMITS, now, {}):
            all_[step.id] = follow(all_[step.id], step.event, now, note=step.note)
        going = [one for one in all_.values() if one.state in (State.STARTING, State.RUNNING)]
        new = [one for one in going if one.id not in before]
        if new:
            assert len(going) <= max(LIMITS.here, len(before))
        for one in going:
            if one.state is State.STARTING:
                one = follow(one, Event.BEGAN, now, note="")
            status = data.draw(st.sampled_from([0, 0, 1, 2, 3, 5, 6, 7, 8]))
            event = Event.ARRIVED if status == 0 else after_attempt(one, status, LIMITS.attempts)
            all_[one.id] = follow(one, event, now, note="", limits=LIMITS)
        before -= {one.id for one in going}
        now += 50.0
    assert all(one.state in ENDED for one in all_.values())


# -- on the disk -----------------------------------------------------------------------------------


def test_a_restart_finds_what_was_there(tmp_path: Path) -> None:
    first = Entries(tmp_path)
    first.put(entry(2))
    first.put(follow(entry(1), Event.STARTED, 5.0, note=""))
    (tmp_path / "torn.json").write_text('{"v": 1, "id": "to')
    (tmp_path / "other.json").write_text((tmp_path / "e1.json").read_text())
    assert [(one.id, one.state) for one in Entries(tmp_path).all()] == [
        ("e1", State.STARTING), ("e2", State.QUEUED)
    ]  # fmt: skip


def test_what_ended_is_kept_for_a_while(tmp_path: Path) -> None:
    entries = Entries(tmp_path)
    for number in range(KEPT + 5):
        entries.put(entry(number, state=State.DONE, since_s=float(number)))
    entries.put(entry(999))
    assert len(list(tmp_path.glob("*.json"))) == KEPT + 1
    assert entries.get("e4") is None
    assert entries.get("e5") is not None


# -- from configuration and policy to a request ----------------------------------------------------

QUEUE = {
    "destination": {"b": {"uri": "qemu+tls://b/system", "link": "wan", "copy_storage": "all"}},
    "link": {"wan": {"slots": 4, "bandwidth": "400mbit"}},
}


def _request(policy: DomainPolicy, **migration: object) -> object:
    config = Config.model_validate({"queue": QUEUE, "migration": migration})
    return orders.request(
        config, "b", domain="u", source_uri="qemu:///system", policy=policy, persistent=True
    )


def test_a_domain_goes_as_its_policy_and_the_configuration_say() -> None:
    found = _request(DomainPolicy(gate="strict", max_wait_s=7.0), on_timeout="abort", bandwidth="1gbit")
    assert (found.policy.name, found.policy.max_wait_s, found.policy.on_timeout) == ("strict", 7.0, "abort")
    assert (found.copy_storage, found.persistent, found.undefine_source) == ("all", True, True)
    assert found.bandwidth_bytes_s == 12.5e6, "a slot's share of the link"
    assert _request(DomainPolicy(bandwidth_bytes_s=2e6)).bandwidth_bytes_s == 2e6
    assert _request(DomainPolicy(), max_wait="forever").policy.max_wait_s is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots": 0}, "queue.slots"),
        ({"destination": {"b": {"uri": "qemu+tls://b/system", "link": "lan"}}}, "destination.b.link"),
        ({"to": "z"}, "queue.to"),
        ({"name": "b"}, "queue.name"),
        ({"destination": {"Host_B": {"uri": "qemu+tls://b/system"}}}, "Host_B"),
        ({"destination": {"b": {"uri": "xen://b"}}}, "xen://b"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_the_start(
    change: dict[str, object], words: str
) -> None:
    with pytest.raises((RefusedError, UsageError), match=words):
        orders.limits(Config.model_validate({"queue": {**QUEUE, **change}}))


def test_a_gate_that_is_none_is_refused_at_the_start() -> None:
    with pytest.raises(UsageError, match=r"migration\.policy"):
        orders.limits(Config.model_validate({"queue": QUEUE, "migration": {"policy": "never"}}))

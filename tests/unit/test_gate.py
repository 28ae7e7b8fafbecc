"""The gate's promises, one look at a time."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest

from virtgrid.core.errors import UsageError
from virtgrid.core.events import check_fields
from virtgrid.migration import gate as gate_module
from virtgrid.migration import policy as policy_module
from virtgrid.migration import stopping as stopping_module
from virtgrid.migration.gate import Decision, GateConfig, GateDecision, MemoryStats, decide
from virtgrid.migration.policy import Backoff, Observation, PolicyConfig, make_policy
from virtgrid.tracker.views import ConnectionView, Snapshot, Verdict

SMALL = MemoryStats(remaining_bytes=1e6, dirty_bytes_s=1e6, bandwidth_bytes_s=10e6, since_sync_s=1.0)
LARGE = MemoryStats(remaining_bytes=8.12e6, dirty_bytes_s=0.0, bandwidth_bytes_s=10e6, since_sync_s=1.0)
BEGAN_S = 100.0


def ask(
    name: str = "strict",
    *,
    unsuitable: int | None = 0,
    stats: MemoryStats = SMALL,
    waited_s: float = 1.0,
    age_s: float = 0.0,
    names: tuple[str, ...] = (),
    **config: Any,
) -> GateDecision:
    settings = PolicyConfig(name=name, **config)  # type: ignore[arg-type]
    policy = make_policy(settings).begin(BEGAN_S)
    now_s = BEGAN_S + waited_s
    seen = None
    if unsuitable is not None:
        seen = Observation(at_s=now_s - age_s, unsuitable=unsuitable, total=20, waiting_for=names)
    return decide(stats, seen, policy, GateConfig.of(settings, max_downtime_s=0.5), now_s, BEGAN_S)


def test_releases_when_no_connection_is_unsuitable_and_memory_fits() -> None:
    answer = ask(unsuitable=0)
    assert answer.decision is Decision.RELEASE
    assert not answer.timed_out
    assert answer.downtime_estimate_s == pytest.approx(0.2)


def test_holds_for_one_unsuitable_connection_and_names_it() -> None:
    answer = ask(unsuitable=1, names=("http 10.0.0.9:40022 response",))
    assert answer.decision is Decision.HOLD
    assert "waiting for 1 of 20" in answer.reason
    assert answer.waiting_for == ("http 10.0.0.9:40022 response",)
    assert answer.until_s == BEGAN_S + 40.0


@pytest.mark.parametrize("name", ["immediate", "strict", "backoff", "adaptive"])
def test_memory_that_does_not_fit_holds_every_policy_and_says_the_figures(name: str) -> None:
    answer = ask(name, stats=LARGE)
    assert answer.decision is Decision.HOLD
    assert "memory: would pause 812 ms, allowed 500 ms" in answer.reason


def test_both_obstacles_are_named_when_both_stand_in_the_way() -> None:
    answer = ask(unsuitable=3, stats=LARGE)
    assert "waiting for 3" in answer.reason
    assert "memory" in answer.reason


def test_dirtied_since_the_last_sync_counts_towards_the_pause() -> None:
    stats = MemoryStats(remaining_bytes=0, dirty_bytes_s=2e6, bandwidth_bytes_s=10e6, since_sync_s=4.0)
    assert stats.downtime_estimate_s == pytest.approx(0.8)


def test_an_unknown_bandwidth_never_looks_like_a_short_pause() -> None:
    answer = ask(stats=MemoryStats(remaining_bytes=0, dirty_bytes_s=0, bandwidth_bytes_s=0, since_sync_s=0))
    assert answer.decision is Decision.HOLD
    assert answer.downtime_estimate_s is None
    assert "cannot be estimated" in answer.reason


def test_immediate_does_not_look_at_connections_nor_need_a_tracker() -> None:
    assert ask("immediate", unsuitable=15).decision is Decision.RELEASE
    assert ask("immediate", unsuitable=None).decision is Decision.RELEASE
    assert ask("immediate", unsuitable=15, age_s=9.0).decision is Decision.RELEASE


@pytest.mark.parametrize("name", ["strict", "backoff", "adaptive"])
def test_a_blind_tracker_is_waited_for_until_the_deadline(name: str) -> None:
    before = ask(name, unsuitable=None)
    assert (before.decision, before.unsuitable) == (Decision.HOLD, None)
    assert "blind" in before.reason
    after = ask(name, unsuitable=None, waited_s=40.0)
    assert after.decision is Decision.RELEASE
    assert after.timed_out
    assert "blind" in after.reason


def test_an_old_observation_is_not_trusted() -> None:
    assert ask(unsuitable=0, age_s=1.0, waited_s=5.0).decision is Decision.RELEASE
    answer = ask(unsuitable=0, age_s=1.2, waited_s=5.0)
    assert answer.decision is Decision.HOLD
    assert "silent: its last word is 1.2 s old" in answer.reason


def test_the_deadline_counts_from_the_beginning_of_the_hold() -> None:
    assert ask(unsuitable=5, waited_s=39.9).decision is Decision.HOLD
    answer = ask(unsuitable=5, waited_s=40.0)
    assert answer.decision is Decision.RELEASE
    assert answer.timed_out
    assert "time is up" in answer.reason
    assert "waiting for 5" in answer.reason


def test_on_timeout_abort_aborts() -> None:
    answer = ask(unsuitable=5, waited_s=40.0, on_timeout="abort")
    assert answer.decision is Decision.ABORT
    assert answer.timed_out


def test_a_good_moment_at_the_deadline_is_taken_rather_than_aborted() -> None:
    answer = ask(unsuitable=0, waited_s=40.0, on_timeout="abort")
    assert answer.decision is Decision.RELEASE
    assert not answer.timed_out


@pytest.mark.parametrize("unsuitable", [0, 5])
def test_on_timeout_hold_leaves_it_to_a_person(unsuitable: int) -> None:
    answer = ask(unsuitable=unsuitable, waited_s=41.0, on_timeout="hold")
    assert answer.decision is Decision.HOLD
    assert "only a person can release" in answer.reason
    assert answer.until_s is None


def test_a_deadline_with_memory_that_does_not_fit_escalates_and_then_releases() -> None:
    first = ask(stats=LARGE, waited_s=40.0)
    assert first.decision is Decision.ESCALATE
    assert "would pause 812 ms" in first.reason
    assert first.until_s == BEGAN_S + 45.0
    last = ask(stats=LARGE, waited_s=45.0)
    assert last.decision is Decision.RELEASE
    assert "released although memory: would pause 812 ms" in last.reason


@pytest.mark.parametrize("forever", [None, math.inf])
def test_without_a_deadline_it_waits_for_ever(forever: float | None) -> None:
    answer = ask(unsuitable=1, waited_s=1e6, max_wait_s=forever)
    assert answer.decision is Decision.HOLD
    assert answer.until_s is None


def test_the_answer_is_a_gate_event_of_the_journal_and_json() -> None:
    for answer in (ask(), ask(unsuitable=None), ask(unsuitable=3, max_wait_s=None)):
        check_fields("gate", answer.fields())
        assert json.loads(json.dumps(answer.fields(), allow_nan=False))["reason"]


def test_a_moment_need_not_be_observed_twice() -> None:
    """The gate gives the policy the observation itself; doing so before changes nothing."""
    settings = PolicyConfig(name="backoff")
    gate = GateConfig.of(settings, max_downtime_s=0.5)
    policy = make_policy(settings).begin(0.0)
    seen = Observation(at_s=1.0, unsuitable=2, total=3)
    assert decide(SMALL, seen, policy, gate, 1.0, 0.0) == decide(
        SMALL, seen, policy.observe(seen), gate, 1.0, 0.0
    )


def test_of_two_looks_at_one_instant_the_later_given_counts() -> None:
    for name in ("strict", "backoff", "adaptive"):
        policy = make_policy(PolicyConfig(name=name)).begin(0.0)  # type: ignore[arg-type]
        policy = policy.observe(Observation(at_s=1.0, unsuitable=0, total=9))
        policy = policy.observe(Observation(at_s=1.0, unsuitable=9, total=9))
        assert not policy.decide(1.0).release


def test_immediate_names_no_number_it_permits() -> None:
    assert "allowed" not in ask("immediate").fields()


def test_unknown_connections_count_and_are_said() -> None:
    def view(client: str, verdict: Verdict) -> ConnectionView:
        return ConnectionView(
            client=client,
            server="s:80",
            protocol="http",
            state="x",
            verdict=verdict,
            reason="why",
            since_s=0.0,
        )

    views = (view("a:1", Verdict.UNKNOWN), view("b:2", Verdict.SUITABLE), view("c:3", Verdict.UNSUITABLE))
    seen = Observation.of(Snapshot(at_s=4.0, connections=views))
    assert (seen.unsuitable, seen.unknown, seen.total) == (2, 1, 3)
    assert seen.waiting_for == ("http a:1 why", "http c:3 why")
    assert "(1 unknown)" in make_policy(PolicyConfig(name="strict")).observe(seen).decide(4.0).reason


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PolicyConfig(name="eager"), "policy must be one of"),  # type: ignore[arg-type]
        (lambda: PolicyConfig(max_wait_s=-1), "max-wait must be between 0 and 604800 seconds, not -1"),
        (lambda: PolicyConfig(max_wait_s=math.nan), "max-wait"),
        (lambda: PolicyConfig(on_timeout="panic"), "on-timeout must be one of release, abort, hold"),  # type: ignore[arg-type]
        (lambda: PolicyConfig(confidence=1.0), "adaptive confidence"),
        (lambda: PolicyConfig(ceiling=0), "adaptive ceiling"),
        (lambda: PolicyConfig(release_latency_s=-0.1), "adaptive release latency"),
        (lambda: PolicyConfig(learn_s=-1), "adaptive learning time"),
        (lambda: PolicyConfig(memory_s=0), "adaptive memory"),
        (lambda: PolicyConfig(horizon_s=0), "adaptive horizon"),
        (lambda: Backoff(start=-1), "backoff start"),
        (lambda: Backoff(steps=()), "backoff steps must rise from above 0 to at most 100000, not nothing"),
        (lambda: Backoff(steps=(1, 1)), "backoff steps must rise"),
        (lambda: Backoff(start=3, steps=(2, 4)), "backoff steps must rise from above 3"),
        (lambda: Backoff(deferrals_per_step=0), "backoff deferrals"),
        (lambda: Backoff(iteration_s=0), "backoff iteration"),
        (lambda: GateConfig(max_downtime_s=0), "max-downtime"),
        (lambda: GateConfig(max_wait_s=-5), "max-wait"),
        (lambda: GateConfig(stale_s=0), "gate staleness"),
        (lambda: GateConfig(escalate_s=-1), "gate escalation"),
    ],
)
def test_a_number_out_of_range_is_one_clear_sentence_and_exit_2(make: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert said in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.exit_status == 2


def test_the_defaults_are_the_papers_numbers() -> None:
    ladder = [Backoff().allowed_after(n) for n in range(25)]
    assert ladder == [0] * 4 + [1] * 4 + [2] * 4 + [4] * 4 + [8] * 4 + [16] * 5


@pytest.mark.parametrize("module", [gate_module, policy_module, stopping_module])
def test_gate_and_policies_know_no_clock_socket_or_daemon(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert not imported & {"asyncio", "socket", "time", "libvirt", "threading", "subprocess", "random"}

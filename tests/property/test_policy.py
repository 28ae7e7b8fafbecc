"""What holds for every policy, whatever the guest does; hours pass on a fake clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from virtgrid.migration.gate import Decision, GateConfig, GateDecision, MemoryStats, decide
from virtgrid.migration.policy import (
    POLICY_NAMES,
    Backoff,
    BackoffPolicy,
    Observation,
    Policy,
    PolicyConfig,
    make_policy,
)
from virtgrid.migration.stopping import _TOPS, Learned, level_of

FITS = MemoryStats(remaining_bytes=0, dirty_bytes_s=0, bandwidth_bytes_s=1e6, since_sync_s=0)
NEVER_FITS = replace(FITS, remaining_bytes=1e9)
GAPS = st.floats(min_value=0.001, max_value=3.0)
COUNTS = st.one_of(st.integers(0, 5), st.integers(0, 40), st.integers(0, 200_000))
#: Looks at the guest: seconds since the look before, and unsuitable connections then.
LOOKS = st.lists(st.tuples(GAPS, COUNTS), min_size=1, max_size=60)
LADDERS = st.builds(
    Backoff,
    deferrals_per_step=st.integers(1, 5),
    steps=st.sets(st.integers(1, 50), min_size=1, max_size=5).map(lambda s: tuple(sorted(s))),
    iteration_s=st.floats(min_value=0.1, max_value=5.0),
)
CONFIGS = st.builds(
    PolicyConfig,
    name=st.sampled_from(POLICY_NAMES),
    backoff=LADDERS,
    max_wait_s=st.one_of(st.none(), st.just(math.inf), st.floats(min_value=0, max_value=60)),
    on_timeout=st.sampled_from(["release", "abort", "hold"]),
    confidence=st.floats(min_value=0.5, max_value=0.99),
    learn_s=st.floats(min_value=0, max_value=10),
)
WATCHING = CONFIGS.filter(lambda c: c.name != "immediate")


@dataclass(frozen=True)
class Step:
    now_s: float
    seen: Observation
    answer: GateDecision
    fits: bool


def looks_at(looks: list[tuple[float, int]], from_s: float) -> list[Observation]:
    out, at_s = [], from_s
    for gap_s, n in looks:
        at_s += gap_s
        out.append(Observation(at_s=at_s, unsuitable=n, total=n + 1))
    return out


def learn(config: PolicyConfig, looks: list[tuple[float, int]]) -> tuple[Policy, float]:
    """A policy that saw these looks before the hold, and when the hold began."""
    policy = make_policy(config)
    seen = looks_at(looks, 0.0)
    for o in seen:
        policy = policy.observe(o)
    return policy.begin(seen[-1].at_s), seen[-1].at_s


def play(
    config: PolicyConfig,
    before: list[tuple[float, int]],
    during: list[tuple[float, int]],
    fits: list[bool] | None = None,
) -> tuple[list[Step], float]:
    """Ask at every look until the hold ends; what was answered, and when the hold began."""
    policy, began_s = learn(config, before)
    gate = GateConfig.of(config, max_downtime_s=0.5)
    steps: list[Step] = []
    for i, o in enumerate(looks_at(during, began_s)):
        policy = policy.observe(o)
        ok = fits[i % len(fits)] if fits else True
        answer = decide(FITS if ok else NEVER_FITS, o, policy, gate, o.at_s, began_s)
        steps.append(Step(o.at_s, o, answer, ok))
        if answer.decision in (Decision.RELEASE, Decision.ABORT):
            break
    return steps, began_s


MEMORY = st.lists(st.booleans(), min_size=1, max_size=10)


@given(WATCHING, LOOKS, LOOKS, MEMORY)
def test_before_the_deadline_nothing_above_the_allowance_is_released(
    config: PolicyConfig, before: list[tuple[float, int]], during: list[tuple[float, int]], fits: list[bool]
) -> None:
    steps, _ = play(config, before, during, fits)
    for s in steps:
        if s.answer.decision is Decision.RELEASE and not s.answer.timed_out:
            assert s.seen.unsuitable <= s.answer.allowed
            assert s.fits


@given(CONFIGS, LOOKS, LOOKS, MEMORY)
def test_the_wait_is_bounded_by_the_deadline_and_the_escalation(
    config: PolicyConfig, before: list[tuple[float, int]], during: list[tuple[float, int]], fits: list[bool]
) -> None:
    steps, began_s = play(config, before, during, fits)
    gate = GateConfig.of(config, max_downtime_s=0.5)
    for s in steps:
        late_s = s.now_s - gate.deadline_s(began_s)
        if config.on_timeout == "abort" and late_s >= 0:
            assert s.answer.decision in (Decision.ABORT, Decision.RELEASE)
        if config.on_timeout == "release" and late_s >= 0:
            assert s.answer.decision in (Decision.RELEASE, Decision.ESCALATE)
            if late_s >= gate.escalate_s:
                assert s.answer.decision is Decision.RELEASE
        if config.on_timeout == "hold" and late_s >= 0:
            assert s.answer.decision is Decision.HOLD
        if late_s < 0:
            assert s.answer.decision in (Decision.HOLD, Decision.RELEASE)
            assert not s.answer.timed_out


@given(CONFIGS, LOOKS, LOOKS, MEMORY)
def test_every_answer_has_a_reason_and_a_future(
    config: PolicyConfig, before: list[tuple[float, int]], during: list[tuple[float, int]], fits: list[bool]
) -> None:
    steps, began_s = play(config, before, during, fits)
    deadline_s = GateConfig.of(config, max_downtime_s=0.5).deadline_s(began_s)
    for s in steps:
        assert s.answer.reason.strip()
        assert "\n" not in s.answer.reason
        assert s.answer.allowed >= 0
        if s.answer.decision is Decision.HOLD and s.now_s < deadline_s < math.inf:
            assert s.answer.until_s is not None
        if s.answer.until_s is not None:
            assert s.answer.until_s > s.now_s


@given(CONFIGS, LOOKS, LOOKS, MEMORY)
def test_the_same_history_gets_the_same_answers(
    config: PolicyConfig, before: list[tuple[float, int]], during: list[tuple[float, int]], fits: list[bool]
) -> None:
    assert play(config, before, during, fits) == play(config, before, during, fits)


@given(CONFIGS, LOOKS)
def test_asking_and_repeating_change_nothing(config: PolicyConfig, looks: list[tuple[float, int]]) -> None:
    policy, began_s = learn(config, looks)
    for o in looks_at(looks, began_s):
        policy = policy.observe(o)
        first = policy.decide(o.at_s)
        assert policy.allowed(o.at_s) == first.allowed
        assert policy.observe(o).decide(o.at_s) == first


@given(LADDERS, LOOKS)
def test_the_allowance_of_the_backoff_never_falls_during_a_hold(
    ladder: Backoff, looks: list[tuple[float, int]]
) -> None:
    policy = make_policy(PolicyConfig(name="backoff", backoff=ladder)).begin(0.0)
    allowed = [policy.allowed(0.0)]
    for o in looks_at(looks, 0.0):
        allowed.append(policy.allowed(o.at_s))
        policy = policy.observe(o)
        allowed.append(policy.allowed(o.at_s))
    assert allowed == sorted(allowed)
    assert allowed[0] == 0


@given(LADDERS, st.integers(1, 40))
def test_the_backoff_climbs_one_step_per_given_number_of_blocked_intervals(ladder: Backoff, n: int) -> None:
    """One look in the middle of each interval, always above the ladder."""
    policy = make_policy(PolicyConfig(name="backoff", backoff=ladder)).begin(0.0)
    for i in range(n):
        o = Observation(at_s=(i + 0.5) * ladder.iteration_s, unsuitable=1000, total=1000)
        policy = policy.observe(o)
    assert policy.allowed((n + 0.5) * ladder.iteration_s) == ladder.allowed_after(n)


@given(LADDERS, st.floats(min_value=0, max_value=1e5))
def test_time_in_which_nobody_looked_is_no_deferral(ladder: Backoff, silence_s: float) -> None:
    policy = make_policy(PolicyConfig(name="backoff", backoff=ladder)).begin(0.0)
    assert policy.allowed(silence_s) == 0


@given(LADDERS, LOOKS)
def test_memory_in_the_way_is_no_deferral(ladder: Backoff, looks: list[tuple[float, int]]) -> None:
    """The connections would have permitted every moment: the ladder must not give way further."""
    policy = make_policy(PolicyConfig(name="backoff", backoff=ladder)).begin(0.0)
    for o in looks_at(looks, 0.0):
        policy = policy.observe(replace(o, unsuitable=0))
    assert isinstance(policy, BackoffPolicy)
    assert policy.deferrals == 0


@given(LOOKS, st.floats(0, 100), st.floats(0, 100), st.floats(0.5, 0.99))
def test_a_longer_budget_never_permits_more(
    looks: list[tuple[float, int]], one_s: float, other_s: float, confidence: float
) -> None:
    learned = Learned(latency_s=0.15, half_life_s=120)
    for o in looks_at(looks, 0.0):
        learned = learned.add(o.at_s, o.unsuitable)
    short_s, long_s = sorted((one_s, other_s))
    patient, pressed = learned.plan(long_s, confidence, 0.05), learned.plan(short_s, confidence, 0.05)
    assert patient.allowed <= pressed.allowed


@given(LOOKS, st.floats(0, 100), st.floats(0.001, 1))
def test_adaptive_stays_below_its_ceiling(
    looks: list[tuple[float, int]], remaining_s: float, ceiling: float
) -> None:
    learned = Learned(latency_s=0.15, half_life_s=1e9)
    seen = looks_at(looks, 0.0)
    for o in seen:
        learned = learned.add(o.at_s, o.unsuitable)
    plan = learned.plan(remaining_s, 0.7, ceiling)
    lasted = [(a.unsuitable, b.at_s - a.at_s) for a, b in pairwise(seen)]
    below_s = sum(s for n, s in lasted if level_of(n) < level_of(plan.allowed))
    assert below_s <= ceiling * sum(s for _, s in lasted) + 1e-6


@given(LOOKS)
def test_until_something_is_learned_adaptive_is_strict(looks: list[tuple[float, int]]) -> None:
    policy = make_policy(PolicyConfig(name="adaptive", learn_s=1e3, max_wait_s=None)).begin(0.0)
    for o in looks_at(looks, 0.0):
        policy = policy.observe(o)
        assert policy.allowed(o.at_s) == 0


@given(st.integers(0, 10_000_000))
def test_every_count_has_a_level_and_levels_are_ordered(count: int) -> None:
    assert level_of(count) <= level_of(count + 1)
    if count < 50_000:
        assert _TOPS[level_of(count)] >= count
        assert level_of(count) < 32 or _TOPS[level_of(count)] <= count * 1.07 + 1


@settings(max_examples=30)
@given(st.lists(st.tuples(GAPS, COUNTS), min_size=1, max_size=200))
def test_memory_of_the_learner_is_bounded_by_the_latency(looks: list[tuple[float, int]]) -> None:
    learned = Learned(latency_s=0.15, half_life_s=120)
    for o in looks_at(looks, 0.0):
        learned = learned.add(o.at_s, o.unsuitable)
        assert len(learned.pending) <= 2 * 0.30 / 0.001 + 2
        assert all(p.due_s > o.at_s for p in learned.pending)

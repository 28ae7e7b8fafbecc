"""The policies against each other on simulated loads; run as a program it prints the table of
docs/reference/policies.md (``python tests/property/test_policy_simulation.py 400``).
"""

from __future__ import annotations

import heapq
import random
import statistics
import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest

from virtgrid.migration.gate import Decision, GateConfig, MemoryStats, decide
from virtgrid.migration.policy import Backoff, Observation, Policy, PolicyConfig, make_policy

LEARN_S = 30.0  # capture before the hold begins: storage copy and first iterations
LOOK_S = 0.05
LATENCY_S = 0.15
MAX_WAIT_S = 40.0
MEMORY = MemoryStats(remaining_bytes=1e6, dirty_bytes_s=1e6, bandwidth_bytes_s=12.5e6, since_sync_s=1.0)


@dataclass(frozen=True)
class Path:
    """A count of unsuitable connections over time: ``counts[i]`` from ``times_s[i]`` on."""

    times_s: list[float]
    counts: list[int]

    def at(self, t_s: float) -> int:
        return self.counts[max(0, bisect_right(self.times_s, t_s) - 1)]


def _serve(rng: random.Random, arrivals_s: list[float], service_s: Callable[[], float]) -> Path:
    """Every arrival is unsuitable for its service time (M/G/infinity when the arrivals are Poisson)."""
    changes: list[tuple[float, int]] = []
    for at_s in arrivals_s:
        heapq.heappush(changes, (at_s, 1))
        heapq.heappush(changes, (at_s + service_s(), -1))
    times_s, counts, n = [-1e9], [0], 0
    while changes:
        at_s, by = heapq.heappop(changes)
        n += by
        times_s.append(at_s)
        counts.append(n)
    return Path(times_s, counts)


def _poisson(rng: random.Random, rate: float, from_s: float, to_s: float) -> list[float]:
    out, t = [], from_s + rng.expovariate(rate)
    while t < to_s:
        out.append(t)
        t += rng.expovariate(rate)
    return out


def steady(seed: int, mean: float = 10.0) -> Path:
    """Poisson arrivals, service 0.5 to 1 s: zero practically never comes."""
    rng = random.Random(f"steady {seed}")
    return _serve(
        rng, _poisson(rng, mean / 0.75, -10.0, LEARN_S + MAX_WAIT_S + 10), lambda: rng.uniform(0.5, 1.0)
    )


def bursty(seed: int) -> Path:
    """Bursts of about 4 s and pauses of about 3: mean 8 or more, variance 50 or more, zeros between."""
    rng = random.Random(f"bursty {seed}")
    arrivals_s: list[float] = []
    t_s = -10.0 - rng.uniform(0, 7)
    while t_s < LEARN_S + MAX_WAIT_S + 10:
        on_s = rng.uniform(2.5, 5.5)
        arrivals_s += _poisson(rng, rng.uniform(16, 36), t_s, t_s + on_s)
        t_s += on_s + 0.5 + rng.expovariate(1 / 2.5)
    return _serve(rng, arrivals_s, lambda: rng.uniform(0.3, 1.0))


def flicker(seed: int) -> Path:
    """Few busy clients: the count often touches 0 for some 30 ms between a page and its images."""
    rng = random.Random(f"flicker {seed}")
    times_s, counts = [-1e9], [2]
    t_s = -10.0
    while t_s < LEARN_S + MAX_WAIT_S + 10:
        t_s += rng.expovariate(1 / 0.6)
        quiet_s = rng.uniform(0.6, 2.0) if rng.random() < 0.12 else rng.uniform(0.02, 0.08)
        times_s += [t_s, t_s + quiet_s]
        counts += [0, rng.choice((2, 4, 6))]
        t_s += quiet_s
    return Path(times_s, counts)


def shift(seed: int) -> Path:
    """Quiet while learning (one visitor now and then), steady from the beginning of the hold on."""
    rng = random.Random(f"shift {seed}")
    arrivals_s = _poisson(rng, 0.5, -10.0, LEARN_S - 2.0)
    arrivals_s += _poisson(rng, 10.0 / 0.75, LEARN_S - 2.0, LEARN_S + MAX_WAIT_S + 10)
    return _serve(rng, arrivals_s, lambda: rng.uniform(0.5, 1.0))


LOADS: dict[str, Callable[[int], Path]] = {
    "steady": steady,
    "bursty": bursty,
    "flicker": flicker,
    "shift": shift,
}


@dataclass(frozen=True)
class Stop:
    """One simulated hold: when it was let go, the count then, at the pause, and while waiting."""

    waited_s: float
    decided: int
    paused: int
    timed_out: bool
    below: float  # share of the time waited (and learned) with a count lower than at the decision


def look(path: Path, at_s: float) -> Observation:
    n = path.at(at_s)
    return Observation(at_s=at_s, unsuitable=n, total=n + 10)


def learned(path: Path, config: PolicyConfig) -> Policy:
    policy = make_policy(config)
    for i in range(int(LEARN_S / LOOK_S)):
        policy = policy.observe(look(path, i * LOOK_S))
    return policy


def hold(path: Path, config: PolicyConfig, policy: Policy | None = None) -> Stop:
    """Play one hold on a clock of its own."""
    policy = (policy or learned(path, config)).begin(LEARN_S)
    gate = GateConfig.of(config, max_downtime_s=0.5)
    seen: list[int] = []
    for i in range(10_000_000):
        now_s = LEARN_S + i * LOOK_S
        o = look(path, now_s)
        seen.append(o.unsuitable)
        policy = policy.observe(o)
        answer = decide(MEMORY, o, policy, gate, now_s, LEARN_S)
        if answer.decision is Decision.RELEASE:
            return Stop(
                waited_s=now_s - LEARN_S,
                decided=o.unsuitable,
                paused=path.at(now_s + LATENCY_S),
                timed_out=answer.timed_out,
                below=sum(1 for n in seen if n < o.unsuitable) / len(seen),
            )
    raise AssertionError("unreachable: the deadline ends every hold")


def config_of(name: str, **numbers: object) -> PolicyConfig:
    return PolicyConfig(name=name, max_wait_s=MAX_WAIT_S, on_timeout="release", **numbers)  # type: ignore[arg-type]


def play(load: str, name: str, runs: int, **numbers: object) -> list[Stop]:
    config = config_of(name, **numbers)
    return [hold(LOADS[load](seed), config) for seed in range(runs)]


def paused(stops: list[Stop]) -> float:
    return statistics.fmean(s.paused for s in stops)


def waited_s(stops: list[Stop]) -> float:
    return statistics.fmean(s.waited_s for s in stops)


VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "immediate": ("immediate", {}),
    "strict": ("strict", {}),
    "backoff": ("backoff", {}),
    "backoff 1 s": ("backoff", {"backoff": Backoff(iteration_s=1.0)}),
    "backoff 0.5 s": ("backoff", {"backoff": Backoff(iteration_s=0.5)}),
    "adaptive": ("adaptive", {}),
    "adaptive, confidence 0.5": ("adaptive", {"confidence": 0.5}),
    "adaptive, confidence 0.9": ("adaptive", {"confidence": 0.9}),
}


RUNS = 40


def sampled(load: Callable[[int], Path], runs: int) -> list[int]:
    """The counts of many runs, four a second."""
    return [path.at(i * 0.25) for path in map(load, range(runs)) for i in range(280)]


@cache
def stops_of(load: str, variant: str) -> list[Stop]:
    name, numbers = VARIANTS[variant]
    return play(load, name, RUNS, **numbers)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("variant", ["immediate", "strict", "backoff", "adaptive"])
def test_no_wait_is_longer_than_the_deadline(load: str, variant: str) -> None:
    assert max(s.waited_s for s in stops_of(load, variant)) <= MAX_WAIT_S + LOOK_S


def test_the_bursty_load_is_as_bursty_as_the_papers() -> None:
    counts = sampled(bursty, RUNS)
    assert statistics.fmean(counts) >= 8
    assert statistics.pvariance(counts) >= 50
    assert 0.1 < counts.count(0) / len(counts) < 0.5


def test_the_steady_load_practically_never_has_a_zero() -> None:
    counts = sampled(steady, RUNS)
    assert 8 <= statistics.fmean(counts) <= 14
    assert counts.count(0) / len(counts) < 1e-3


@pytest.mark.parametrize("variant", ["strict", "backoff", "adaptive"])
def test_with_bursts_the_guest_is_stopped_with_at_most_one_unsuitable_on_average(variant: str) -> None:
    stops = stops_of("bursty", variant)
    assert paused(stops_of("bursty", "immediate")) > 8
    assert paused(stops) <= 1
    assert not any(s.timed_out for s in stops)


@pytest.mark.parametrize("load", ["steady", "bursty", "flicker"])
def test_adaptive_stops_no_higher_than_backoff_and_waits_no_longer_where_zero_never_comes(load: str) -> None:
    adaptive, backoff = stops_of(load, "adaptive"), stops_of(load, "backoff")
    assert paused(adaptive) <= paused(backoff)
    if load == "steady":
        assert waited_s(adaptive) <= waited_s(backoff)


def test_adaptive_is_lower_than_a_backoff_quickened_to_wait_as_long() -> None:
    """At equal waiting time: the 1 s ladder waits longer than adaptive here, and stops higher."""
    adaptive, backoff = stops_of("steady", "adaptive"), stops_of("steady", "backoff 1 s")
    assert waited_s(adaptive) <= waited_s(backoff)
    assert paused(adaptive) < paused(backoff)


def test_a_steady_guest_is_let_go_within_the_lowest_twentieth_of_the_counts_seen_while_waiting() -> None:
    adaptive = stops_of("steady", "adaptive")
    assert not any(s.timed_out for s in adaptive)
    assert max(s.below for s in adaptive) <= 0.05
    backoff = [s for s in stops_of("steady", "backoff") if not s.timed_out]
    assert len(backoff) >= RUNS * 0.7
    assert statistics.median(s.below for s in backoff) <= 0.05


def test_adaptive_waits_for_moments_that_last_where_most_do_not() -> None:
    """In the flickering load two of three zeros are over before the guest stands still."""
    assert paused(stops_of("flicker", "adaptive")) <= 0.5 * paused(stops_of("flicker", "strict"))


def test_adaptive_notices_that_the_load_has_changed() -> None:
    stops = stops_of("shift", "adaptive")
    assert sum(s.timed_out for s in stops) <= 0.15 * RUNS
    assert waited_s(stops) < waited_s(stops_of("shift", "backoff"))
    assert paused(stops) < 0.8 * paused(stops_of("shift", "immediate"))


def main(runs: int) -> None:
    for load, make in LOADS.items():
        samples = sampled(make, runs)
        print(
            f"\n{load}: mean {statistics.fmean(samples):.1f}, variance {statistics.pvariance(samples):.0f}, "
            f"zero {samples.count(0) / len(samples):.1%} of the time\n"
        )
        print("| policy | count at the pause (mean, worst) | waited (mean, worst) | timed out |")
        print("|---|---|---|---|")
        for title, (name, numbers) in VARIANTS.items():
            stops = play(load, name, runs, **numbers)
            print(
                f"| {title} | {paused(stops):.2f}, {max(s.paused for s in stops)} "
                f"| {waited_s(stops):.1f} s, {max(s.waited_s for s in stops):.1f} s "
                f"| {sum(s.timed_out for s in stops) / runs:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)

"""Policies: how many unsuitable connections are put up with at this moment of a hold.

Pure: every policy is an immutable value. ``observe`` and ``begin`` return the next state, times
are arguments. The theory and the figures stand in docs/reference/policies.md. The back-off is
that of Ishikawa et al. 2011, section 4.3.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Protocol, Self

from virtgrid.core.errors import UsageError
from virtgrid.migration.stopping import Learned
from virtgrid.tracker.views import Snapshot

PolicyName = Literal["immediate", "strict", "backoff", "adaptive"]
OnTimeout = Literal["release", "abort", "hold"]

POLICY_NAMES: Final[tuple[PolicyName, ...]] = ("immediate", "strict", "backoff", "adaptive")
ON_TIMEOUT: Final[tuple[OnTimeout, ...]] = ("release", "abort", "hold")

_DAY_S: Final = 86400.0
#: Names kept of the connections waited for: enough for a line on a terminal.
_NAMES: Final = 8


def check_range(name: str, value: float, low: float, high: float, unit: str = "") -> None:
    """Raise UsageError unless low <= value <= high (NaN is refused too)."""
    if not low <= value <= high:
        suffix = f" {unit}" if unit else ""
        raise UsageError(f"{name} must be between {low:g} and {high:g}{suffix}, not {value:g}")


def check_max_wait(value_s: float | None) -> None:
    """None and infinity both mean: for ever. Raise UsageError for anything else out of range."""
    if value_s is not None and value_s != math.inf:
        check_range("max-wait", value_s, 0, 7 * _DAY_S, "seconds")


def check_on_timeout(value: str) -> None:
    """Raise UsageError unless the value is one of ON_TIMEOUT."""
    if value not in ON_TIMEOUT:
        raise UsageError(f"on-timeout must be one of {', '.join(ON_TIMEOUT)}, not '{value}'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One look at the connections of the guest.

    at_s: when, on the caller's monotonic clock. unsuitable: includes unknown (the tracker cannot
    tell, so it counts against stopping). waiting_for: names of unsuitable connections, for people.
    """

    at_s: float
    unsuitable: int
    total: int
    unknown: int = 0
    waiting_for: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.unknown <= self.unsuitable <= self.total:
            raise ValueError(
                f"{self.unknown} unknown, {self.unsuitable} unsuitable of {self.total} connections"
            )

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """What the gate needs of a tracker's snapshot."""
        names = [f"{c.protocol} {c.client} {c.reason}" for c in snapshot.connections if not c.suitable]
        return cls(
            at_s=snapshot.at_s,
            unsuitable=snapshot.unsuitable,
            unknown=snapshot.unknown,
            total=snapshot.total,
            waiting_for=tuple(names[:_NAMES]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """The ladder of the back-off; the defaults are the paper's (section 4.3).

    start: permitted at first. deferrals_per_step: deferrals before the next step. steps: permitted
    after each step; the last one stays. iteration_s: the interval that counts as one iteration.
    """

    start: int = 0
    deferrals_per_step: int = 4
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    iteration_s: float = 2.5

    def __post_init__(self) -> None:
        check_range("backoff start", self.start, 0, 100_000, "connections")
        check_range("backoff deferrals", self.deferrals_per_step, 1, 1000)
        check_range("backoff iteration", self.iteration_s, 0.1, 3600, "seconds")
        ladder = (self.start, *self.steps)
        if len(ladder) < 2 or any(a >= b for a, b in itertools.pairwise(ladder)) or ladder[-1] > 100_000:
            text = ", ".join(map(str, self.steps)) or "nothing"
            raise UsageError(f"backoff steps must rise from above {self.start} to at most 100000, not {text}")

    def allowed_after(self, deferrals: int) -> int:
        """Unsuitable connections permitted after so many deferrals."""
        step = deferrals // self.deferrals_per_step
        return (self.start, *self.steps)[min(step, len(self.steps))]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Which policy, and its numbers; out of range raises UsageError.

    max_wait_s: from the beginning of the hold; None or infinity: for ever.
    on_timeout: what then (see gate.py).
    confidence: adaptive waits for a lower count only when it comes again within the rest of the
    budget with this probability. ceiling: adaptive never permits more than the count that the guest
    stayed at or below for this share of the time. release_latency_s: from the decision to the stopped
    guest. learn_s: observe at least so long before permitting more than 0. memory_s: half-life
    of what was learned. horizon_s: stands for the rest of the budget when there is no deadline.
    """

    name: PolicyName = "backoff"
    backoff: Backoff = field(default_factory=Backoff)
    max_wait_s: float | None = 40.0
    on_timeout: OnTimeout = "release"
    confidence: float = 0.7
    ceiling: float = 0.05
    release_latency_s: float = 0.15
    learn_s: float = 5.0
    memory_s: float = 120.0
    horizon_s: float = 60.0

    def __post_init__(self) -> None:
        if self.name not in POLICY_NAMES:
            raise UsageError(f"policy must be one of {', '.join(POLICY_NAMES)}, not '{self.name}'")
        check_max_wait(self.max_wait_s)
        check_on_timeout(self.on_timeout)
        check_range("adaptive confidence", self.confidence, 0.5, 0.999)
        check_range("adaptive ceiling", self.ceiling, 0.001, 1)
        check_range("adaptive release latency", self.release_latency_s, 0, 10, "seconds")
        check_range("adaptive learning time", self.learn_s, 0, 3600, "seconds")
        check_range("adaptive memory", self.memory_s, 1, _DAY_S, "seconds")
        check_range("adaptive horizon", self.horizon_s, 1, _DAY_S, "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a policy says of this moment, as far as connections are concerned.

    until_s: when the permitted number may next change by itself, None when it will not.
    """

    release: bool
    reason: str
    allowed: int
    until_s: float | None = None


class Policy(Protocol):
    """An immutable state; ``observe`` and ``begin`` return the next one.

    ``observe`` is also called before the hold begins (capture starts with the migration), and the
    same observation twice changes nothing. ``allowed`` and ``decide`` may be asked at any time not
    before the last observation.
    """

    @property
    def watches(self) -> bool:
        """Whether connections matter to this policy at all."""
        ...

    def observe(self, o: Observation, /) -> Policy: ...

    def begin(self, now_s: float, /) -> Policy: ...

    def allowed(self, now_s: float, /) -> int: ...

    def decide(self, now_s: float, /) -> Choice: ...


#: When what was learned made the wait less probable than this, the load has changed (adaptive).
_SURPRISE: Final = 0.1
#: Permits any number: what ``immediate`` answers when asked how many.
ANY_NUMBER: Final = 1_000_000


def _compare(seen: Observation | None, allowed: int, name: str) -> tuple[bool, str]:
    if seen is None:
        return False, f"{name}: the connections have not been seen yet"
    unknown = f" ({seen.unknown} unknown)" if seen.unknown else ""
    if seen.unsuitable <= allowed:
        return (
            True,
            f"{name}: {seen.unsuitable} of {seen.total} connections unsuitable{unknown}, {allowed} permitted",
        )
    return (
        False,
        f"{name}: waiting for {seen.unsuitable} of {seen.total} connections{unknown}, {allowed} permitted",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Immediate:
    """Plain libvirt: connections do not matter."""

    watches: bool = False

    def observe(self, o: Observation, /) -> Immediate:
        return self

    def begin(self, now_s: float, /) -> Immediate:
        return self

    def allowed(self, now_s: float, /) -> int:
        return ANY_NUMBER

    def decide(self, now_s: float, /) -> Choice:
        return Choice(release=True, reason="immediate: connections are not waited for", allowed=ANY_NUMBER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strict:
    """No unsuitable connection at all; the deadline is the gate's business."""

    seen: Observation | None = None
    watches: bool = True

    def observe(self, o: Observation, /) -> Strict:
        return replace(self, seen=_newer(self.seen, o))

    def begin(self, now_s: float, /) -> Strict:
        return self

    def allowed(self, now_s: float, /) -> int:
        return 0

    def decide(self, now_s: float, /) -> Choice:
        release, reason = _compare(self.seen, 0, "strict")
        return Choice(release=release, reason=reason, allowed=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffPolicy:
    """The paper's: 0 permitted, 1 after four deferrals, then 2, 4, 8, 16 (section 4.3).

    A deferral is an interval of ``iteration_s`` of the hold in which the connections were looked at
    and no look found the permitted number. An interval nobody looked in is no deferral, nor is one in which
    only memory stood in the way: the ladder is there to give way to connections.
    """

    config: Backoff
    seen: Observation | None = None
    began_s: float | None = None
    interval_s: float = 0.0  # when the present interval began
    deferrals: int = 0
    looked: bool = False
    met: bool = False
    watches: bool = True

    def observe(self, o: Observation, /) -> BackoffPolicy:
        if _newer(self.seen, o) is self.seen:
            return self
        if self.began_s is None or o.at_s < self.began_s:
            return replace(self, seen=o)
        state = self._advance(o.at_s)
        met = state.met or o.unsuitable <= state.config.allowed_after(state.deferrals)
        return replace(state, seen=o, looked=True, met=met)

    def begin(self, now_s: float, /) -> BackoffPolicy:
        return replace(self, began_s=now_s, interval_s=now_s, deferrals=0, looked=False, met=False)

    def allowed(self, now_s: float, /) -> int:
        return self.config.allowed_after(self._advance(now_s).deferrals)

    def decide(self, now_s: float, /) -> Choice:
        state = self._advance(now_s)
        allowed = state.config.allowed_after(state.deferrals)
        release, reason = _compare(state.seen, allowed, "backoff")
        if state.began_s is None:
            return Choice(release=release, reason=reason, allowed=allowed)
        end_s = state.interval_s + state.config.iteration_s
        return Choice(
            release=release,
            reason=f"{reason} after {state.deferrals} deferral{'' if state.deferrals == 1 else 's'}",
            allowed=allowed,
            until_s=None if release or allowed == state.config.steps[-1] else end_s,
        )

    def _advance(self, now_s: float) -> BackoffPolicy:
        """Close the intervals that ended by now; only the first can have been looked at."""
        if self.began_s is None:
            return self
        passed = math.floor((now_s - self.interval_s) / self.config.iteration_s)
        if passed < 1:
            return self
        return replace(
            self,
            interval_s=self.interval_s + passed * self.config.iteration_s,
            deferrals=self.deferrals + (1 if self.looked and not self.met else 0),
            looked=False,
            met=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """Ours: stop at the lowest count that will probably be seen again within the rest of the budget.

    What is learned stands in stopping.py; this adds the deadline. learned: since capture began;
    before: the same as it stood when the hold began; since: learned in the hold alone.
    """

    config: PolicyConfig
    learned: Learned
    before: Learned | None = None
    since: Learned | None = None
    seen: Observation | None = None
    began_s: float | None = None
    watches: bool = True

    def observe(self, o: Observation, /) -> Adaptive:
        if _newer(self.seen, o) is self.seen:
            return self
        return replace(
            self,
            seen=o,
            learned=self.learned.add(o.at_s, o.unsuitable),
            since=None if self.since is None else self.since.add(o.at_s, o.unsuitable),
        )

    def begin(self, now_s: float, /) -> Adaptive:
        return replace(self, began_s=now_s, before=self.learned, since=_learner(self.config))

    def allowed(self, now_s: float, /) -> int:
        return self.decide(now_s).allowed

    def decide(self, now_s: float, /) -> Choice:
        remaining_s = self._remaining_s(now_s)
        learn_s = min(self.config.learn_s, (self.config.max_wait_s or math.inf) / 4)
        if self.learned.observed_s < learn_s:
            release, reason = _compare(self.seen, 0, "adaptive")
            return Choice(release=release, reason=f"{reason}, still learning", allowed=0)
        plan = self.learned.plan(remaining_s, self.config.confidence, self.config.ceiling)
        if self.before and self.since and self.since.observed_s >= learn_s:
            waited_s = self.since.observed_s
            if plan.hopeless or self.before.chance_of_none(plan, waited_s) < _SURPRISE:
                plan = self.since.plan(remaining_s, self.config.confidence, self.config.ceiling)
        allowed = plan.allowed
        release, reason = _compare(self.seen, allowed, "adaptive")
        until_s = None
        settles_s = self.learned.settles_s
        if release and not plan.accepts(self.learned.count, has_settled=now_s >= settles_s):
            release, until_s = False, settles_s
            reason = f"{reason}, but such moments are too short here; waiting for one that lasts"
        return Choice(release=release, reason=f"{reason}; {plan.reason}", allowed=allowed, until_s=until_s)

    def _remaining_s(self, now_s: float) -> float:
        if self.config.max_wait_s is None or math.isinf(self.config.max_wait_s):
            return self.config.horizon_s
        waited_s = 0.0 if self.began_s is None else now_s - self.began_s
        return max(0.0, self.config.max_wait_s - waited_s)


def _learner(config: PolicyConfig) -> Learned:
    return Learned(latency_s=config.release_latency_s, half_life_s=config.memory_s)


def _newer(seen: Observation | None, o: Observation) -> Observation:
    """The one to go by: of two looks at one instant that differ the later given counts."""
    return seen if seen is not None and (o.at_s < seen.at_s or o == seen) else o


def make_policy(config: PolicyConfig) -> Policy:
    """The policy's first state, nothing observed yet."""
    match config.name:
        case "immediate":
            return Immediate()
        case "strict":
            return Strict()
        case "backoff":
            return BackoffPolicy(config=config.backoff)
        case "adaptive":
            return Adaptive(config=config, learned=_learner(config))

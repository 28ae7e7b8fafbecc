"""What the adaptive policy learns from the counts, and when it says stop. Pure.

The count of unsuitable connections is a step function of time. An *offer* is "stop at the first
moment the count is at most k", or "... has been at most k for as long as a release takes": a dip
shorter than that is over before the guest stands still. For every offer two things are learned:

* how often it comes: N separate visits in the T seconds the count was above k. With a flat prior on the
  logarithm of the rate, the chance to meet one within r seconds is 1 - (T / (T + r))^N: 0 if none ever came.
* what it is worth: the mean count one release latency later. Rare offers lean on a prior, the mean of a
  process where each connection ends at a rate of its own and new ones come regardless (M/M/infinity):
  n s + m (1 - s), with s = exp(-latency x departures per connection and second), m the mean count.

The aim is the best worth among the offers that come again in the rest of the budget with the wanted
confidence; a present moment at least as good is taken. As the budget shrinks fewer offers qualify
and the aim rises, up to a ceiling: a quantile of the counts seen.

The load may change when the hold has begun. If what was learned before says that a permitted moment should
have come by now with 90 % probability, it is not believed any more, and what was learned since counts alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Final

_EXACT: Final = 32  # counts below are levels of their own,
_GROWTH: Final = 1.06  # above levels are this factor wide
_LEVELS: Final = _EXACT + 140  # the last one takes everything above ~100,000
_APART_S: Final = 1.0  # visits closer together are one: the count trembles at the edge of a level
_PRIOR_WEIGHT: Final = 4.0  # the prior of an offer's worth counts as so many visits
_DECAY_EVERY_S: Final = 10.0

_Row = tuple[float, ...]
_ZEROS: Final[_Row] = (0.0,) * _LEVELS
_NEVER: Final[_Row] = (-math.inf,) * _LEVELS
_OUTSIDE: Final[_Row] = (math.inf,) * _LEVELS


@lru_cache(maxsize=4096)
def level_of(count: int) -> int:
    """The level a count falls into."""
    if count < _EXACT:
        return count
    return min(_LEVELS - 1, _EXACT + int(math.log(count / _EXACT) / math.log(_GROWTH) + 1e-9))


def _top_of(level: int) -> int:
    """The largest count of a level (a level may be empty: then the one below's)."""
    if level < _EXACT:
        return level
    return math.ceil(_EXACT * _GROWTH ** (level - _EXACT + 1) - 1e-9) - 1


_TOPS: Final = tuple(_top_of(level) for level in range(_LEVELS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is permitted now; -1 is nothing.

    fresh: counts permitted at once. lasting: counts permitted after they have lasted. hopeless: no
    offer comes with the wanted confidence, so the ceiling is all there is to go by.
    """

    fresh: int
    lasting: int
    reason: str
    hopeless: bool = False

    @property
    def allowed(self) -> int:
        return max(self.fresh, self.lasting, 0)

    def accepts(self, count: int, *, has_settled: bool) -> bool:
        """Whether this moment may be taken; one that has lasted is also good enough as a fresh one."""
        return count <= self.fresh or (has_settled and count <= self.lasting)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A drop of the count whose worth is not known yet: it entered the levels low..high at entered_s."""

    due_s: float
    entered_s: float
    low: int
    high: int
    lasting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offers:
    """One kind of offer, per level: weighted visits, their worth, and when the last one ended."""

    visits: _Row = _ZEROS
    worth_sum: _Row = _ZEROS
    worth_n: _Row = _ZEROS

    def scaled(self, by: float) -> _Offers:
        return _Offers(
            visits=_scale(self.visits, by),
            worth_sum=_scale(self.worth_sum, by),
            worth_n=_scale(self.worth_n, by),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Statistics of the count, immutable; ``add`` returns the next.

    time_at: seconds at each level, halved every half_life_s like all else that is summed.
    entered_s: per level, since when the count has been at most that (infinite: it is above).
    left_s: per level, when the last visit ended.
    """

    latency_s: float
    half_life_s: float
    at_s: float | None = None
    count: int = 0
    observed_s: float = 0.0
    time_at: _Row = _ZEROS
    integral: float = 0.0  # connection-seconds
    departures: float = 0.0
    entered_s: _Row = _OUTSIDE
    left_s: _Row = _NEVER
    fresh: _Offers = _Offers()
    lasting: _Offers = _Offers()
    pending: tuple[_Pending, ...] = ()
    decay_due_s: float = math.inf

    def add(self, at_s: float, count: int) -> Learned:
        """The count is this from now on; times must not go back."""
        level = level_of(count)
        if self.at_s is None:
            # The count's age is not known: it begins now, and is no visit.
            entered = tuple(at_s if k >= level else math.inf for k in range(_LEVELS))
            return replace(self, at_s=at_s, count=count, entered_s=entered, decay_due_s=at_s + _DECAY_EVERY_S)
        state = self._matured(at_s)._elapsed(at_s)
        if count == state.count:
            return state
        old = level_of(state.count)
        gone = max(0, state.count - count)
        state = replace(state, count=count, departures=state.departures + gone)
        if level < old:
            return state._dropped(at_s, level, old - 1)
        if level > old:
            outside = (math.inf,) * (level - old)
            left = (at_s,) * (level - old)
            return replace(
                state,
                entered_s=state.entered_s[:old] + outside + state.entered_s[level:],
                left_s=state.left_s[:old] + left + state.left_s[level:],
            )
        return state

    @property
    def settles_s(self) -> float:
        """When the count will not have been above the present one for a release latency."""
        return self.entered_s[level_of(self.count)] + self.latency_s

    def plan(self, remaining_s: float, confidence: float, ceiling: float) -> Plan:
        """What to permit with so much of the budget left; see the top of this module."""
        total_s = sum(self.time_at)
        if total_s <= 0:
            return Plan(fresh=0, lasting=-1, reason="nothing learned yet")
        cap = self._quantile(ceiling * total_s)
        fresh = self._worths(self.fresh, cap)
        lasting = self._worths(self.lasting, cap)
        aim = math.inf
        for offers, worths in ((self.fresh, fresh), (self.lasting, lasting)):
            for level in range(cap + 1):
                outside_s = sum(self.time_at[level + 1 :])
                if _none_within(offers.visits[level], outside_s, remaining_s) <= 1.0 - confidence:
                    aim = min(aim, worths[level])
        if math.isinf(aim):
            reason = f"no lower count is {confidence:.0%} sure to come in the time left"
            return Plan(fresh=_TOPS[cap], lasting=_TOPS[cap], reason=reason, hopeless=True)
        slack = 1e-9
        take_fresh = max((k for k in range(cap + 1) if fresh[k] <= aim + slack), default=-1)
        take_lasting = max((k for k in range(cap + 1) if lasting[k] <= aim + slack), default=-1)
        best = max(take_fresh, take_lasting)
        return Plan(
            fresh=_TOPS[take_fresh] if take_fresh >= 0 else -1,
            lasting=_TOPS[take_lasting] if take_lasting >= 0 else -1,
            reason=f"{_TOPS[best]} or fewer is {confidence:.0%} sure to come again in the time left",
        )

    def chance_of_none(self, plan: Plan, within_s: float) -> float:
        """How probable it was, by what is known here, to meet nothing the plan permits for so long."""
        offers, count = (self.fresh, plan.fresh) if plan.fresh >= 0 else (self.lasting, plan.lasting)
        if count < 0:
            return 1.0
        level = level_of(count)
        return _none_within(offers.visits[level], sum(self.time_at[level + 1 :]), within_s)

    def _worths(self, offers: _Offers, cap: int) -> _Row:
        """Expected count at the pause for levels 0..cap, never better for a higher level than for a lower."""
        total_s = sum(self.time_at)
        mean = self.integral / total_s
        per_s = self.departures / self.integral if self.integral > 0 else 0.0
        stay = math.exp(-self.latency_s * per_s)
        worths = [
            (offers.worth_sum[k] + _PRIOR_WEIGHT * (_TOPS[k] * stay + mean * (1 - stay)))
            / (offers.worth_n[k] + _PRIOR_WEIGHT)
            for k in range(cap + 1)
        ]
        # From the top down: whoever is at 2 is also at "at most 3".
        return tuple(reversed(tuple(accumulate(reversed(worths), min))))

    def _quantile(self, seconds: float) -> int:
        """The lowest level such that the count was at or below it for so many seconds."""
        for level, below_s in enumerate(accumulate(self.time_at)):
            if below_s >= seconds:
                return level
        return _LEVELS - 1

    def _elapsed(self, at_s: float) -> Learned:
        """The present count lasted until at_s."""
        assert self.at_s is not None
        spent_s = at_s - self.at_s
        level = level_of(self.count)
        state = replace(
            self,
            at_s=at_s,
            observed_s=self.observed_s + spent_s,
            time_at=_plus(self.time_at, level, level, spent_s),
            integral=self.integral + self.count * spent_s,
        )
        if at_s < state.decay_due_s:
            return state
        by = 0.5 ** ((at_s - state.decay_due_s + _DECAY_EVERY_S) / self.half_life_s)
        return replace(
            state,
            time_at=_scale(state.time_at, by),
            integral=state.integral * by,
            departures=state.departures * by,
            fresh=state.fresh.scaled(by),
            lasting=state.lasting.scaled(by),
            decay_due_s=at_s + _DECAY_EVERY_S,
        )

    def _dropped(self, at_s: float, low: int, high: int) -> Learned:
        """The count fell: it is now at most k for k in low..high. A new visit unless the last just ended."""
        apart = [k for k in range(low, high + 1) if at_s - self.left_s[k] >= _APART_S]
        fresh = self.fresh
        if apart:
            # left_s is not ordered by level, so the levels that count may be any of them.
            visits = list(fresh.visits)
            for k in apart:
                visits[k] += 1.0
            fresh = replace(fresh, visits=tuple(visits))
        width = high - low + 1
        drop = _Pending(due_s=at_s + self.latency_s, entered_s=at_s, low=low, high=high, lasting=False)
        return replace(
            self,
            fresh=fresh,
            entered_s=self.entered_s[:low] + (at_s,) * width + self.entered_s[high + 1 :],
            pending=(*self.pending, drop),
        )

    def _matured(self, at_s: float) -> Learned:
        """Learn the worth of the drops whose latency is over; the count did not change until at_s."""
        if not self.pending or self.pending[0].due_s > at_s:
            return self
        fresh, lasting = self.fresh, self.lasting
        waiting = list(self.pending)
        while waiting and waiting[0].due_s <= at_s:
            p = waiting.pop(0)
            if p.lasting:
                lasting = _worth(lasting, p, self.count)
                continue
            fresh = _worth(fresh, p, self.count)
            # Levels not left since: the low ones go first, so what remains is p.high downwards.
            still = [k for k in range(p.low, p.high + 1) if self.entered_s[k] == p.entered_s]
            if still:
                lasting = replace(lasting, visits=_plus(lasting.visits, still[0], still[-1], 1.0))
                due_s = p.due_s + self.latency_s
                again = replace(p, due_s=due_s, low=still[0], high=still[-1], lasting=True)
                at = next((i for i, q in enumerate(waiting) if q.due_s > due_s), len(waiting))
                waiting.insert(at, again)
        return replace(self, fresh=fresh, lasting=lasting, pending=tuple(waiting))


def _none_within(visits: float, outside_s: float, within_s: float) -> float:
    """The chance that none of an offer's visits comes in so many seconds."""
    if visits <= 0 or within_s <= 0:
        return 1.0
    return float((outside_s / (outside_s + within_s)) ** visits)


def _worth(offers: _Offers, p: _Pending, count: int) -> _Offers:
    return replace(
        offers,
        worth_sum=_plus(offers.worth_sum, p.low, p.high, float(count)),
        worth_n=_plus(offers.worth_n, p.low, p.high, 1.0),
    )


def _plus(row: _Row, low: int, high: int, amount: float) -> _Row:
    return row[:low] + tuple(v + amount for v in row[low : high + 1]) + row[high + 1 :]


def _scale(row: _Row, by: float) -> _Row:
    return tuple(v * by for v in row)

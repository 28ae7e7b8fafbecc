"""The gate: hold, release, escalate or abort, with the reason. Pure.

Order of the questions, first answer wins (docs/reference/policies.md has it as a table):

1. memory fits the downtime and the policy permits this moment    -> RELEASE
   (with on_timeout ``hold`` only before the deadline)
2. before the deadline                                            -> HOLD, saying what is missing
3. deadline passed, ``abort``                                     -> ABORT
4. deadline passed, ``hold``                                      -> HOLD, only a person can release now
5. deadline passed, ``release``, memory fits                      -> RELEASE
6. the same, memory does not fit, for ``escalate_s`` at most      -> ESCALATE
7. the same, later                                                -> RELEASE, the pause will be long
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from virtgrid.core.units import format_duration
from virtgrid.migration.policy import (
    ANY_NUMBER,
    Observation,
    OnTimeout,
    Policy,
    PolicyConfig,
    check_max_wait,
    check_on_timeout,
    check_range,
)


class Decision(StrEnum):
    """What the driver is to do. ESCALATE: make memory fit by stronger means, then look again."""

    HOLD = "hold"
    RELEASE = "release"
    ESCALATE = "escalate"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStats:
    """What the stop-and-copy would have to send.

    remaining_bytes: dirty at the last sync and not sent yet. dirty_bytes_s: the guest's rate since.
    bandwidth_bytes_s: what the wire carries when let go. since_sync_s: age of the last sync; QEMU
    counts dirty pages only then, so what came after must be estimated.
    """

    remaining_bytes: float
    dirty_bytes_s: float
    bandwidth_bytes_s: float
    since_sync_s: float

    @property
    def downtime_estimate_s(self) -> float:
        """Seconds the guest would be stopped for memory; infinite when the bandwidth is unknown (0)."""
        pending_bytes = self.remaining_bytes + self.dirty_bytes_s * self.since_sync_s
        if self.bandwidth_bytes_s > 0:
            return pending_bytes / self.bandwidth_bytes_s
        return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """The gate's limits; out of range raises UsageError.

    max_downtime_s: the pause agreed on. max_wait_s: from the beginning of the hold; None or
    infinity: for ever. stale_s: an older observation is not trusted. escalate_s: how long after the
    deadline the driver may try to make memory fit.
    """

    max_downtime_s: float = 0.5
    max_wait_s: float | None = 40.0
    on_timeout: OnTimeout = "release"
    stale_s: float = 1.0
    escalate_s: float = 5.0

    def __post_init__(self) -> None:
        check_range("max-downtime", self.max_downtime_s, 0.001, 2000, "seconds")
        check_max_wait(self.max_wait_s)
        check_on_timeout(self.on_timeout)
        check_range("gate staleness", self.stale_s, 0.05, 60, "seconds")
        check_range("gate escalation", self.escalate_s, 0, 3600, "seconds")

    @classmethod
    def of(cls, policy: PolicyConfig, *, max_downtime_s: float) -> Self:
        """The gate that belongs to a policy: same deadline, same thing to do then."""
        return cls(max_downtime_s=max_downtime_s, max_wait_s=policy.max_wait_s, on_timeout=policy.on_timeout)

    def deadline_s(self, hold_began_s: float) -> float:
        """When the hold's time is up, on the clock of ``hold_began_s``; may be infinite."""
        return hold_began_s + (math.inf if self.max_wait_s is None else self.max_wait_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateDecision:
    """The decision and everything a person asks about it.

    until_s: when the answer may change by itself (next step of the policy, or deadline).
    timed_out: the deadline made this decision, not the policy.
    unsuitable: None when the connections were not seen. downtime_estimate_s: None when unknown.
    """

    decision: Decision
    reason: str
    until_s: float | None
    unsuitable: int | None
    allowed: int
    waited_s: float
    waiting_for: tuple[str, ...] = ()
    downtime_estimate_s: float | None = None
    timed_out: bool = False

    def fields(self) -> dict[str, Any]:
        """The fields of a ``gate`` event of the journal; what is not known is left out."""
        values: dict[str, Any] = {
            "decision": self.decision.value,
            "reason": self.reason,
            "unsuitable": self.unsuitable,
            "allowed": self.allowed if self.allowed < ANY_NUMBER else None,
            "waiting_for": list(self.waiting_for),
            "until_s": self.until_s,
            "waited_s": round(self.waited_s, 3),
            "downtime_estimate_s": self.downtime_estimate_s,
        }
        return {name: value for name, value in values.items() if value is not None}


def decide(
    stats: MemoryStats,
    observation: Observation | None,
    policy: Policy,
    gate: GateConfig,
    now_s: float,
    hold_began_s: float,
) -> GateDecision:
    """Whether to let the switchover go now; the table at the top of this module.

    observation: the newest look at the connections, None when the tracker is blind. It need not have
    been given to ``policy`` before. Times: one monotonic clock, seconds.
    """
    estimate_s = stats.downtime_estimate_s
    fits = estimate_s <= gate.max_downtime_s
    memory = _memory_text(estimate_s, gate.max_downtime_s)
    waited_s = max(0.0, now_s - hold_began_s)
    deadline_s = gate.deadline_s(hold_began_s)
    timed_out = now_s >= deadline_s

    state = policy if observation is None else policy.observe(observation)
    choice = state.decide(now_s)
    blind = _blindness(observation, gate, now_s) if state.watches else None
    permits = choice.release and blind is None

    until_s: float | None = None
    if permits and fits and not (timed_out and gate.on_timeout == "hold"):
        decision, reason, by_deadline = Decision.RELEASE, choice.reason, False
    elif not timed_out:
        missing = [blind or choice.reason] if not permits else []
        if not fits:
            missing.append(memory)
        # A step that rounding puts at this very moment is no future.
        steps = [t for t in (deadline_s, choice.until_s) if t is not None and now_s < t < math.inf]
        until_s = min(steps, default=None)
        decision, reason, by_deadline = Decision.HOLD, "; ".join(missing), False
    else:
        decision, what = _at_deadline(gate, fits, memory, now_s - deadline_s)
        still = blind or (memory if permits and not fits else choice.reason)
        reason = f"{what} (waited {format_duration(waited_s)}; {still})"
        by_deadline = True
        if decision is Decision.ESCALATE:
            until_s = deadline_s + gate.escalate_s

    return GateDecision(
        decision=decision,
        reason=reason,
        until_s=until_s,
        unsuitable=None if observation is None else observation.unsuitable,
        allowed=choice.allowed,
        waited_s=waited_s,
        waiting_for=() if observation is None else observation.waiting_for,
        downtime_estimate_s=estimate_s if math.isfinite(estimate_s) else None,
        timed_out=by_deadline,
    )


def _at_deadline(gate: GateConfig, fits: bool, memory: str, late_s: float) -> tuple[Decision, str]:
    """Rows 3 to 7 of the table."""
    match gate.on_timeout:
        case "abort":
            return Decision.ABORT, "time is up and on-timeout is abort"
        case "hold":
            return Decision.HOLD, "time is up and on-timeout is hold: only a person can release now"
        case "release":
            if fits:
                return Decision.RELEASE, "time is up and on-timeout is release"
            if late_s < gate.escalate_s:
                return Decision.ESCALATE, f"time is up, but {memory}"
            return Decision.RELEASE, f"time is up, released although {memory}"


def _blindness(observation: Observation | None, gate: GateConfig, now_s: float) -> str | None:
    if observation is None:
        return "the tracker is blind: the connections cannot be seen"
    age_s = now_s - observation.at_s
    if age_s > gate.stale_s:
        return f"the tracker is silent: its last word is {format_duration(age_s)} old"
    return None


def _memory_text(estimate_s: float, limit_s: float) -> str:
    if math.isinf(estimate_s):
        return "memory: the pause cannot be estimated yet"
    return f"memory: would pause {format_duration(estimate_s)}, allowed {format_duration(limit_s)}"

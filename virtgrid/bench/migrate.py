"""``virtgrid bench migrate``: plain libvirt and gated migrations of a web guest, interleaved, under one load.

A run is three trials under the same seeded load: no migration at all, a plain one, a gated one.
The guest goes to and fro, so plain and gated take turns at being the first to leave.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from virtgrid.bench.counts import Burstiness, before_pause, burstiness, share_below, while_held
from virtgrid.bench.hold import Release, release_of
from virtgrid.bench.result import Figure, Goal, Result, at_least, at_most, figure, ratio
from virtgrid.bench.where import measured_at
from virtgrid.core.errors import MigrationFailedError
from virtgrid.core.units import format_duration, format_size
from virtgrid.lab.felt import Felt, LoadWanted, under_load
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.layout import LabConfig, LinkSpec
from virtgrid.lab.stage import Journey, Stage, Tell, lab_name, staged

NONE: Final = "none"
PLAIN: Final = "plain"
GATED: Final = "gated"
BACKOFF: Final = "backoff"
#: Of the first run's load without a migration, when nothing was migrated yet.
_FIRST_NONE_S: Final = 25.0
_MAX_WAIT_S: Final = 40.0
#: A burst and the silence after it, on average.
CYCLE_S: Final = 9.0
GUEST: Final = "web"
POLICIES: Final = (BACKOFF, "adaptive", "strict", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class MigratePlan:
    """What to measure. policy: of the gated migrations; ``both``: adaptive, beside back-off.

    after_s: how long the load goes on when the migration has ended.
    """

    runs: int = 3
    rate_bytes_s: float = 12.5e6
    rtt_s: float = 0.1
    sessions: int = 60
    load: str = "bursty"
    policy: str = BACKOFF
    seed: int = 1
    after_s: float = 8.0

    @property
    def both(self) -> bool:
        return self.policy == "both"

    def offset_s(self, run: int) -> float:
        """How long the load runs before the migration of this run begins.

        Load and migration start together and last about the same in every run, so that pauses would
        always fall into the same part of a burst. Spread over one cycle they are a fair sample.
        """
        share = random.Random(f"{self.seed}/offset").random()  # noqa: S311 - not a secret
        return CYCLE_S * (run - 1 + share) / self.runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One stretch of load, with a migration in it or without."""

    run: int
    kind: str
    load: Felt
    journey: Journey | None = None
    counts: tuple[tuple[float, float], ...] = field(default=())

    @property
    def unsuitable(self) -> int | None:
        """Connections unsuitable when QEMU stopped the guest, by the tracker; None: not counted."""
        if self.journey is None:
            return None
        stopped = self.journey.first("stopped")
        value = stopped.get("unsuitable") if stopped else None
        return None if value is None else int(value)

    @property
    def release(self) -> Release | None:
        return None if self.journey is None else release_of(self.journey)

    def end(self, name: str) -> float | None:
        """A figure of the journal's last line."""
        value = None if self.journey is None else self.journey.end.get(name)
        return None if value is None else float(value)

    @property
    def otherwise_s(self) -> float | None:
        """Total time without the waiting."""
        total_s = self.end("total_s")
        return None if total_s is None else total_s - (self.end("held_s") or 0.0)

    @property
    def percentile(self) -> float | None:
        """The share of the waiting in which fewer were unsuitable than at the pause."""
        if self.journey is None or self.unsuitable is None:
            return None
        return share_below(while_held(self.journey.timeline), self.unsuitable)

    @property
    def percentile_of_all(self) -> float | None:
        """The same of all that was seen before the pause, not of the waiting alone."""
        return None if self.unsuitable is None else share_below(self.counts, self.unsuitable)

    def as_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"run": self.run, "kind": self.kind, "load": self.load.as_dict()}
        if self.journey is None:
            return told
        release = self.release
        seen = burstiness([list(self.counts)])
        return told | {
            "from": self.journey.source,
            "to": self.journey.destination,
            "unsuitable_at_pause": self.unsuitable,
            "downtime_s": self.end("downtime_s"),
            "total_s": self.end("total_s"),
            "held_s": self.end("held_s"),
            "sent_bytes": self.journey.sent_bytes,
            "answering": self.journey.end.get("answering"),
            "release": None if release is None else release.as_dict(),
            "unsuitable_before_pause": None if seen is None else seen.as_dict(),
            "share_of_waiting_with_fewer": self.percentile,
            "share_of_all_seen_with_fewer": self.percentile_of_all,
        }


# --- measuring --------------------------------------------------------------------------------


def measure(plan: MigratePlan, tell: Tell, *, journals: Path | None = None) -> Result:
    """Bring up a lab, measure, take it down. journals: a directory to keep those of the migrations in."""
    config = LabConfig(name=lab_name("mig"), wan=LinkSpec(rate_bytes_s=plan.rate_bytes_s, rtt_s=plan.rtt_s))
    trials: list[Trial] = []
    failures: list[str] = []
    with staged(config, tell, journals=journals) as stage:
        where = measured_at(
            stage,
            runs=plan.runs,
            sessions=plan.sessions,
            load=plan.load,
            policy=plan.policy,
            seed=plan.seed,
        )
        stage.boot(GuestSpec(name=GUEST))
        for run in range(1, plan.runs + 1):
            trials += _run(stage, plan, run, trials, failures)
    return Result(
        bench="migrate",
        environment=where,
        figures=(
            *figures(plan, trials),
            figure("migrations_failed", [len(failures)], goal=at_most(0)),
        ),
        raw={"failures": failures, "trials": [trial.as_dict() for trial in trials], **_lists(trials)},
    )


def order(plan: MigratePlan, run: int) -> tuple[str, ...]:
    """The trials of a run, in order; plain and gated take turns at being first.

    With both policies back-off comes before adaptive, which is given the time back-off waited.
    """
    gated = (BACKOFF, GATED) if plan.both else (GATED,)
    return (PLAIN, *gated, NONE) if run % 2 else (*gated, PLAIN, NONE)


def _run(
    stage: Stage, plan: MigratePlan, run: int, before: Sequence[Trial], failures: list[str]
) -> list[Trial]:
    wanted = LoadWanted(
        address=stage.guests[GUEST].spec.address,
        sessions=plan.sessions,
        shape=plan.load,
        seed=plan.seed + run - 1,
    )
    done: list[Trial] = []
    for kind in order(plan, run):
        stage.tell(f"run {run} of {plan.runs}, {kind}: load of {plan.sessions} sessions, {plan.load}")
        try:
            done.append(_trial(stage, plan, run, kind, wanted, [*before, *done]))
            stage.tell(f"  {_summary(done[-1])}")
        except MigrationFailedError as error:
            # The guest is still where it was; the figures say that one is missing.
            failures.append(f"run {run}, {kind}: {error.what}")
            stage.tell(f"  FAILED: {error.what}")
    return done


def _trial(
    stage: Stage, plan: MigratePlan, run: int, kind: str, wanted: LoadWanted, before: Sequence[Trial]
) -> Trial:
    journey: Journey | None = None
    with under_load(stage.lab, wanted) as load:
        load.run_for(plan.offset_s(run))
        load.begin()
        if kind == NONE:
            known = [seconds for trial in before if (seconds := trial.end("total_s")) is not None]
            load.run_for(statistics.fmean(known) if known else _FIRST_NONE_S)
        else:
            journey = stage.migrate(GUEST, *options(plan, run, kind, before))
        load.run_for(plan.after_s)
        told = load.stop()
    counts = () if journey is None else tuple(before_pause(journey.timeline))
    return Trial(run=run, kind=kind, load=told, journey=journey, counts=counts)


def options(plan: MigratePlan, run: int, kind: str, before: Sequence[Trial]) -> list[str]:
    """What is asked of virtgrid migrate for a trial of this kind."""
    if kind == PLAIN:
        return ["--policy", "immediate"]
    policy = kind if kind == BACKOFF else "adaptive" if plan.both else plan.policy
    wait_s = _MAX_WAIT_S
    if plan.both and kind == GATED:
        # Equal waiting time: what back-off took in this run is all that adaptive may take.
        held = [trial.end("held_s") for trial in before if trial.run == run and trial.kind == BACKOFF]
        wait_s = max(1.0, held[0] or 0.0) if held else _MAX_WAIT_S
    return ["--policy", policy, "--max-wait", f"{wait_s:g}s", "--on-timeout", "release"]


def _summary(trial: Trial) -> str:
    words = []
    if trial.journey is not None:
        words = [
            f"{trial.unsuitable if trial.unsuitable is not None else '?'} unsuitable at the pause",
            f"stopped {format_duration(trial.end('downtime_s') or 0.0)}",
            f"held {format_duration(trial.end('held_s') or 0.0)}",
            f"total {format_duration(trial.end('total_s') or 0.0)}",
            f"WAN {format_size(trial.journey.sent_bytes)}",
        ]
    return ", ".join([*words, trial.load.in_words()])


# --- figures: pure ------------------------------------------------------------------------------


def _lists(trials: Sequence[Trial]) -> dict[str, Any]:
    kinds = sorted({trial.kind for trial in trials if trial.journey is not None})
    return {
        f"unsuitable_at_pause_{kind}": [trial.unsuitable for trial in trials if trial.kind == kind]
        for kind in kinds
    }


def figures(plan: MigratePlan, trials: Sequence[Trial]) -> list[Figure]:
    """The figures from the trials."""
    of = {kind: [trial for trial in trials if trial.kind == kind] for kind in (NONE, PLAIN, GATED, BACKOFF)}
    bursty = plan.load == "bursty"
    out = _at_pause(of, bursty=bursty, both=plan.both)
    out += _time_and_bytes(of)
    out += _clients(of)
    out += _load(burstiness([list(trial.counts) for trial in trials if trial.counts]), bursty=bursty)
    return out


Trials = Mapping[str, Sequence[Trial]]


def _at_pause(of: Trials, *, bursty: bool, both: bool) -> list[Figure]:
    plain = figure("unsuitable_at_pause_plain", [trial.unsuitable for trial in of[PLAIN]])
    gated = figure(
        "unsuitable_at_pause_gated",
        [trial.unsuitable for trial in of[GATED]],
        peer=plain.value,
        goal=at_most(1) if bursty else None,
    )
    decided = [trial.release.unsuitable_decided if trial.release else None for trial in of[GATED]]
    out = [plain, gated, figure("unsuitable_decided_gated", decided)]
    lowest: Goal | None = None if bursty else at_most(0.05)
    out.append(
        figure("waiting_with_fewer_share_gated", [trial.percentile for trial in of[GATED]], goal=lowest)
    )
    out.append(figure("seen_with_fewer_share_gated", [trial.percentile_of_all for trial in of[GATED]]))
    if both:
        backoff = figure(
            "unsuitable_at_pause_backoff", [trial.unsuitable for trial in of[BACKOFF]], peer=plain.value
        )
        out += [
            backoff,
            figure("waiting_with_fewer_share_backoff", [trial.percentile for trial in of[BACKOFF]]),
            ratio("adaptive_vs_backoff", gated, backoff, goal=at_most(1)),
        ]
    return out


def _time_and_bytes(of: Trials) -> list[Figure]:
    out: list[Figure] = []
    kinds = [kind for kind in (PLAIN, GATED, BACKOFF) if of[kind]]
    downtimes = {
        kind: figure(f"downtime_s_{kind}", [t.end("downtime_s") for t in of[kind]], "s") for kind in kinds
    }
    out += downtimes.values()
    # "Does not grow": within what two equal things differ by on a busy machine.
    out.append(ratio("downtime_gated_vs_plain", downtimes[GATED], downtimes[PLAIN], goal=at_most(1.1)))
    out += [figure(f"total_s_{kind}", [t.end("total_s") for t in of[kind]], "s") for kind in kinds]
    held = [trial.end("held_s") for trial in of[GATED]]
    out.append(figure("held_s_gated", held, "s", of=max, goal=at_most(_MAX_WAIT_S + 0.5, "s")))
    otherwise = {
        kind: figure(f"total_without_hold_s_{kind}", [t.otherwise_s for t in of[kind]], "s") for kind in kinds
    }
    out.append(
        ratio("total_without_hold_gated_vs_plain", otherwise[GATED], otherwise[PLAIN], goal=at_most(1.1))
    )
    plain_bytes: float | None = None
    for kind in kinds:
        sent = figure(
            f"sent_bytes_{kind}",
            [t.journey.sent_bytes if t.journey else None for t in of[kind]],
            "B",
            peer=plain_bytes,
        )
        plain_bytes = sent.value if kind == PLAIN else plain_bytes
        out.append(sent)
    latencies = [trial.release.latency_ms if trial.release else None for trial in of[GATED]]
    out.append(figure("release_to_pause_ms", latencies, "ms", of=statistics.median))
    return out


_CLIENT_FIGURES: Final[tuple[tuple[str, str, Callable[[Felt], float | None]], ...]] = (
    ("qos_good_tolerable", "share", lambda load: load.good_tolerable),
    ("delayed_requests", "requests", lambda load: load.delayed),
    ("delayed_share", "share", lambda load: load.delayed_share),
    ("worst_request_s", "s", lambda load: load.worst_s),
)


def _clients(of: Trials) -> list[Figure]:
    out: list[Figure] = []
    for name, unit, get in _CLIENT_FIGURES:
        base: float | None = None
        for kind in (NONE, PLAIN, GATED, BACKOFF):
            if of[kind]:
                made = figure(f"{name}_{kind}", [get(t.load) for t in of[kind]], unit, peer=base)
                base = made.value if kind == NONE else base
                out.append(made)
    return out


def _load(seen: Burstiness | None, *, bursty: bool) -> list[Figure]:
    if seen is None:
        return []
    some = Goal(text="> 0", met=lambda value: value > 0)
    return [
        figure("load_unsuitable_mean", [seen.mean], goal=at_least(8)),
        figure("load_unsuitable_variance", [seen.variance], goal=at_least(50) if bursty else None),
        figure("load_zero_share", [seen.zeros], goal=some if bursty else None),
    ]

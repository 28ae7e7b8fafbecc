"""``virtgrid bench switchover``: what clients feel of the moment; plain libvirt, gated, flipped, drained.

A run is one migration of each kind, which take turns at being first, of one guest that goes to and fro
between the sites of a stretched lab: its clients reach the first site only, and it keeps its address.
Nothing but what measures asks anything of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from virtgrid.bench.result import Figure, Goal, Result, at_least, at_most, figure
from virtgrid.bench.where import measured_at
from virtgrid.core.errors import MigrationFailedError
from virtgrid.core.events import Record
from virtgrid.lab.felt_pause import AROUND_S, FeltPause, felt_pause, probing
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.layout import LabConfig, LinkSpec
from virtgrid.lab.stage import Journey, Stage, Tell, lab_name, staged

PLAIN: Final = "plain"
GATED: Final = "gated"
FLIP: Final = "flip"
DRAIN: Final = "drain"
KINDS: Final = (PLAIN, GATED, FLIP, DRAIN)
_FLIPPED: Final = (FLIP, DRAIN)
_GUEST: Final = GuestSpec(name="web", memory_mib=128)
#: Of the rate: the service's own frames come over the same link, through the segment.
_SHARE: Final = 0.8
_MAX_WAIT: Final = "10s"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchoverPlan:
    """What to measure. rtt_s: between the sites; client_rtt_s: between the clients and the first site."""

    runs: int = 5
    rate_bytes_s: float = 12.5e6
    rtt_s: float = 0.1
    client_rtt_s: float = 0.02

    @property
    def farthest_rtt_s(self) -> float:
        """From the clients to the guest at the other site, and back."""
        return self.client_rtt_s + self.rtt_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One migration.

    short: connections whose request was being answered when QEMU stopped the guest.
    flip_after_s: from that stop until the frames were turned; None: they were not.
    drain_s: what was decided at the release, None where nothing was; drain: why.
    """

    run: int
    kind: str
    source: str
    destination: str
    pause_s: float
    unsuitable: int | None
    short: int
    felt: FeltPause
    flip_after_s: float | None
    replayed: int | None
    drain_s: float | None
    drain: str | None


def measure(plan: SwitchoverPlan, tell: Tell, *, journals: Path | None = None) -> Result:
    """Bring up a lab, measure, take it down. journals: a directory to keep those of the migrations in."""
    config = LabConfig(
        name=lab_name("swi"),
        wan=LinkSpec(rate_bytes_s=plan.rate_bytes_s, rtt_s=plan.rtt_s),
        client_rtt_s=plan.client_rtt_s,
        stretched=True,
    )
    trials: list[Trial] = []
    failures: list[str] = []
    with staged(config, tell, journals=journals) as stage:
        where = measured_at(stage, runs=plan.runs, client_rtt_s=plan.client_rtt_s)
        stage.boot(_GUEST)
        for run in range(1, plan.runs + 1):
            for kind in order(run):
                try:
                    trials.append(_trial(stage, plan, run, kind))
                    tell(f"run {run} of {plan.runs}, {kind}: {_in_words(trials[-1])}")
                except MigrationFailedError as error:
                    # The guest is still where it was; the figures say that one is missing.
                    failures.append(f"run {run}, {kind}: {error.what}")
                    tell(f"run {run} of {plan.runs}, {kind}: FAILED: {error.what}")
    return Result(
        bench="switchover",
        environment=where,
        figures=(*figures(plan, trials), figure("migrations_failed", [len(failures)], goal=at_most(0))),
        raw={"failures": failures, "trials": [asdict(trial) for trial in trials]},
    )


def order(run: int) -> tuple[str, ...]:
    """The kinds of a run. Their number is even and a run begins one later: in two, each goes both ways."""
    turn = (run - 1) % len(KINDS)
    return KINDS[turn:] + KINDS[:turn]


def options(plan: SwitchoverPlan, kind: str) -> list[str]:
    """What is asked of virtgrid migrate for a trial of this kind."""
    rate = ["--bandwidth", f"{plan.rate_bytes_s * 8 * _SHARE / 1e3:.0f}kbit"]
    if kind == PLAIN:
        return [*rate, "--policy", "immediate"]
    gated = ["--policy", "backoff", "--max-wait", _MAX_WAIT, "--on-timeout", "release"]
    flip, drain = ("auto" if on else "off" for on in (kind in _FLIPPED, kind == DRAIN))
    return [*rate, *gated, "--flip", flip, "--drain", drain]


def _trial(stage: Stage, plan: SwitchoverPlan, run: int, kind: str) -> Trial:
    with probing(stage.lab, _GUEST.address) as prober:
        journey = stage.migrate(_GUEST.name, *options(plan, kind))
        time.sleep(AROUND_S)  # what is measured ends so long after the pause
        probes = prober.stop()
    return trial_of(journey, probes, run=run, kind=kind)


def trial_of(
    journey: Journey, probes: Mapping[str, Sequence[tuple[float, float | None]]], *, run: int, kind: str
) -> Trial:
    """A trial from its journal and the prober's times. Errors: MigrationFailedError, no pause seen."""
    stopped, resumed = journey.first("stopped"), journey.first("resumed")
    pause_s = journey.end.get("downtime_s")
    if stopped is None or resumed is None or pause_s is None:
        raise MigrationFailedError("QEMU did not tell when the guest stopped and ran again")
    at_s = stopped.mono_s + float(stopped["clock_s"]) - journey.wall_s(stopped)
    flipped, released = journey.first("flip", state="flipped"), journey.first("released")
    return Trial(
        run=run,
        kind=kind,
        source=journey.source,
        destination=journey.destination,
        pause_s=float(pause_s),
        unsuitable=stopped.get("unsuitable"),
        short=answering(journey.records, at_s),
        felt=felt_pause(probes, stopped.mono_s, resumed.mono_s),
        flip_after_s=flipped.get("after_s") if flipped else None,
        replayed=flipped.get("replayed") if flipped else None,
        drain_s=released.get("drain_s") if released and kind == DRAIN else None,
        drain=released.get("drain") if released and kind == DRAIN else None,
    )


def answering(records: Sequence[Record], at_s: float) -> int:
    """How many connections had a request under way at a moment of the records' monotonic clock. Pure.

    The first request of a connection is not told of by itself, and is left out.
    """
    standing: dict[tuple[str, str], bool] = {}
    for record in records:
        if record.event == "connection" and float(record["seen_s"]) <= at_s:
            under_way = record["verdict"] == "unsuitable" and record.get("state") != "new"
            standing[str(record["client"]), str(record["server"])] = under_way
    return sum(standing.values())


def _in_words(trial: Trial) -> str:
    def ms(seconds: float | None) -> str:
        return "never answered" if seconds is None else f"{seconds * 1000:.0f} ms"

    felt = trial.felt
    drained = "" if trial.drain is None else f", drain: {trial.drain}"
    return (
        f"stopped {ms(trial.pause_s)}, {felt.pings_lost} pings lost, longest request {ms(felt.stall_kept_s)}"
        f" on an open connection, {ms(felt.stall_new_s)} on a new one{drained}"
    )


# --- figures: pure ------------------------------------------------------------------------------


def figures(plan: SwitchoverPlan, trials: Sequence[Trial]) -> list[Figure]:
    """The figures from the trials; those of plain are the peers of the others."""
    of = {kind: [trial for trial in trials if trial.kind == kind] for kind in KINDS}
    none_lost = at_most(0)
    goals = dict.fromkeys(_FLIPPED, none_lost)
    out = _each("pings_lost", "", of, lambda trial: trial.felt.pings_lost, goals, of_all=max)
    for kind in _FLIPPED:
        kept = [1.0 if trial.felt.pings_lost == 0 else 0.0 for trial in of[kind]]
        out.append(figure(f"without_loss_{kind}", kept, "share", goal=at_least(1)))
    out += _each("stall_established_ms", "ms", of, lambda trial: _ms(trial.felt.stall_kept_s))
    out += _each("stall_new_ms", "ms", of, lambda trial: _ms(trial.felt.stall_new_s))
    out += _each("awake_ms", "ms", of, lambda trial: _ms(trial.felt.awake_s))
    out += _each("pause_ms", "ms", of, lambda trial: _ms(trial.pause_s))
    out += _each("unsuitable", "", of, lambda trial: trial.unsuitable)
    out += _each("unsuitable_short", "", of, lambda trial: trial.short, {DRAIN: at_most(0)})
    rtt_ms = plan.farthest_rtt_s * 1000
    for name, stall, round_trips in (("established", "stall_kept_s", 2), ("new", "stall_new_s", 3)):
        beyond = [_beyond_ms(trial, stall) for trial in of[FLIP]]
        goal = at_most(round(round_trips * rtt_ms), f"ms, {round_trips} RTT")
        out.append(figure(f"stall_{name}_beyond_pause_ms_flip", beyond, "ms", of=max, goal=goal))
    out.append(
        figure("flip_after_stop_ms", [_ms(t.flip_after_s) for t in of[FLIP]], "ms", of=statistics.median)
    )
    out.append(figure("replayed_flip", [t.replayed for t in of[FLIP]], "frames"))
    drained = [1.0 if trial.drain_s else 0.0 for trial in of[DRAIN]]
    out.append(figure("drained", drained, "share"))
    before = [-t.flip_after_s * 1000 for t in of[DRAIN] if t.drain_s and t.flip_after_s is not None]
    out.append(figure("drained_before_stop_ms", before, "ms", of=statistics.median))
    return out


def _each(
    name: str,
    unit: str,
    of: Mapping[str, Sequence[Trial]],
    get: Callable[[Trial], float | None],
    goals: Mapping[str, Goal] | None = None,
    *,
    of_all: Callable[[Sequence[float]], float] = statistics.fmean,
) -> list[Figure]:
    out: list[Figure] = []
    peer: float | None = None
    for kind in KINDS:
        samples = [get(trial) for trial in of[kind]]
        made = figure(f"{name}_{kind}", samples, unit, of=of_all, peer=peer, goal=(goals or {}).get(kind))
        peer = made.value if kind == PLAIN else peer
        out.append(made)
    return out


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _beyond_ms(trial: Trial, stall: str) -> float | None:
    value: Any = getattr(trial.felt, stall)
    return None if value is None else (value - trial.pause_s) * 1000

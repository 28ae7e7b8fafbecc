"""``virtgrid bench protocols``: does waiting for a better moment help clients that do not speak HTTP?

The paper measured HTTP. Here real servers (nginx, vsftpd, Dovecot, Exim) serve seeded clients, and the
guest is stopped for a moment again and again: at a random moment (plain), or when the gate with the
back-off policy allows it, with definitions under which a connection is suitable as soon as nothing is
outstanding on it (gated), or only when nothing was for a while (settled). The arms take turns, and
a fourth one stops nothing: what is late by itself is known from it. No QEMU: what stops the guest,
and how close it comes to a stopped one, stands in lab/servers/keeper.py.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from virtgrid.bench.result import Figure, Result, figure
from virtgrid.bench.where import environment
from virtgrid.core.clock import SystemClock
from virtgrid.lab.layout import LinkSpec
from virtgrid.lab.servers import ftp, layout, mail, web
from virtgrid.lab.servers.clientprocess import ClientProcess
from virtgrid.lab.servers.clients import MAILBOX_BYTES, ClientsWanted, Command, reader
from virtgrid.lab.servers.host import Server, ServerHost
from virtgrid.lab.stage import Tell, lab_name
from virtgrid.migration import gate
from virtgrid.migration.policy import Backoff, Observation, PolicyConfig, make_policy
from virtgrid.net.addresses import parse_mac
from virtgrid.net.capture import TapWatcher
from virtgrid.tracker.definition import Definition, builtin
from virtgrid.tracker.rules import Kind, Pause
from virtgrid.tracker.tracker import Change, Tracker
from virtgrid.tracker.views import Snapshot

PROTOCOLS: Final = ("http", "ftp", "pop3", "imap", "smtp")
ARMS: Final = ("none", "plain", "gated", "settled")
#: Late: so much more than the command's median (the load's limit too, lab/load/qos.py).
LATE_S: Final = 0.1
#: From the gate's decision to the stopped guest: QEMU's window, the floor of what was measured.
RELEASE_S: Final = 0.1
#: What ``idle`` means to an arm's gate; the built-in definitions have the one or the other.
EAGER: Final = Pause(Kind.OK)
SETTLED: Final = Pause(Kind.QUIET, 0.3)
#: The paper's ladder (0, then 1, 2, 4 … permitted), climbed five times as fast: a hold here has no precopy
#: to wait for, and each of many pauses must come to its end.
_LADDER: Final = Backoff(iteration_s=0.5)
_LINK: Final = LinkSpec(rate_bytes_s=12.5e6, rtt_s=0.02)
_LOOK_S: Final = 0.02
_WARM_UP_S: Final = 5.0
_AFTER_S: Final = 1.5

_Watcher = TapWatcher[Snapshot, Change]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolsPlan:
    """What to measure. rounds: pauses of every arm, for each protocol; pause_s: how long each is."""

    protocols: tuple[str, ...] = PROTOCOLS
    rounds: int = 12
    pause_s: float = 0.3
    max_wait_s: float = 10.0
    sessions: int = 12
    link: LinkSpec = _LINK
    seed: int = 1


# --- what the clients felt: pure ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """One pause of an arm. unsuitable: connections at its beginning, by the arm's own tracker.

    waited_s: for the gate. timed_out: the deadline let go, not the policy.
    """

    arm: str
    begin_s: float
    end_s: float
    unsuitable: int | None
    waited_s: float
    timed_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """Commands late through one pause. outstanding: those of them that had begun before it."""

    late: int
    outstanding: int
    failed: int


def usual_s(commands: Sequence[Command], stops: Sequence[Stop]) -> dict[str, float]:
    """The median time of each command outside the pauses."""
    times: dict[str, list[float]] = {}
    for one in commands:
        if one.ok and not any(_overlap(one, stop) for stop in stops if stop.arm != "none"):
            times.setdefault(one.name, []).append(one.took_s)
    return {name: statistics.median(values) for name, values in times.items()}


def felt(commands: Sequence[Command], stop: Stop, usual: Mapping[str, float]) -> Felt:
    """Which commands a pause made late. A name never seen outside the pauses is not judged."""
    late = [
        one
        for one in commands
        if one.ok and one.name in usual and _overlap(one, stop) and one.took_s > usual[one.name] + LATE_S
    ]
    return Felt(
        late=len(late),
        outstanding=sum(one.begin_s < stop.begin_s for one in late),
        failed=sum(not one.ok and _overlap(one, stop) for one in commands),
    )


def _overlap(one: Command, stop: Stop) -> bool:
    return one.begin_s < stop.end_s and one.end_s > stop.begin_s


def figures(protocol: str, commands: Sequence[Command], stops: Sequence[Stop]) -> list[Figure]:
    """A protocol's figures: per pause, means."""
    usual = usual_s(commands, stops)
    of = {arm: [stop for stop in stops if stop.arm == arm] for arm in ARMS}
    seen = {arm: [felt(commands, stop, usual) for stop in of[arm]] for arm in ARMS}
    out: list[Figure] = []
    plain: dict[str, float | None] = {}
    for arm in ("plain", "none", "gated", "settled"):
        for name, samples in (
            ("delayed", [float(one.late) for one in seen[arm]]),
            ("delayed_outstanding", [float(one.outstanding) for one in seen[arm]]),
        ):
            one = figure(f"{protocol}_{name}_{arm}", samples, peer=plain.get(name))
            if arm == "plain":
                plain[name] = one.value
            out.append(one)
        if arm != "none":
            out.append(figure(f"{protocol}_unsuitable_at_pause_{arm}", [stop.unsuitable for stop in of[arm]]))
        if arm in ("gated", "settled"):
            out.append(figure(f"{protocol}_waited_s_{arm}", [stop.waited_s for stop in of[arm]], "s"))
    return out


# --- measuring ------------------------------------------------------------------------------------


def with_idle(definitions: Sequence[Definition], pause: Pause) -> list[Definition]:
    """The same definitions, but with this verdict for ``idle``."""
    return [replace(one, pauses={**one.pauses, "idle": pause}) for one in definitions]


def measure(plan: ProtocolsPlan, tell: Tell) -> Result:
    """Make a server host for each protocol in turn, and stop it again and again under its clients."""
    where = environment(
        rate_bytes_s=plan.link.rate_bytes_s,
        rtt_s=plan.link.rtt_s,
        sessions=plan.sessions,
        pause_s=plan.pause_s,
        rounds=plan.rounds,
        seed=plan.seed,
    )
    found: list[Figure] = []
    raw: dict[str, Any] = {}
    for protocol in plan.protocols:
        commands, stops = _measure_protocol(plan, protocol, tell)
        found += figures(protocol, commands, stops)
        raw[protocol] = _raw(commands, stops)
    return Result(bench="protocols", environment=where, figures=tuple(found), raw=raw)


def _raw(commands: Sequence[Command], stops: Sequence[Stop]) -> dict[str, Any]:
    usual = usual_s(commands, stops)
    return {
        "commands": len(commands),
        "failed": sum(not one.ok for one in commands),
        "usual_s": {name: round(value, 4) for name, value in sorted(usual.items())},
        "pauses": [
            {
                "arm": stop.arm,
                "lasted_s": round(stop.end_s - stop.begin_s, 4),
                "unsuitable": stop.unsuitable,
                "waited_s": round(stop.waited_s, 3),
                "timed_out": stop.timed_out,
                **{name: getattr(felt(commands, stop, usual), name) for name in Felt.__slots__},
            }
            for stop in stops
        ],
    }


def _server(protocol: str, host: ServerHost, sessions: int) -> Server:
    if protocol in ("pop3", "imap"):
        server = mail.dovecot(host.directory)
        for number in range(sessions):
            mail.fill_mailbox(host.directory, reader(number), MAILBOX_BYTES)
        return server
    makers: dict[str, Callable[..., Server]] = {"http": web.nginx, "ftp": ftp.vsftpd, "smtp": mail.exim}
    return makers[protocol](host.directory)


def _measure_protocol(plan: ProtocolsPlan, protocol: str, tell: Tell) -> tuple[list[Command], list[Stop]]:
    chance = random.Random(f"{plan.seed}/{protocol}")  # noqa: S311 - moments, no secret
    stops: list[Stop] = []
    with ServerHost(f"{lab_name('p')}-{protocol}", link=plan.link) as host, ExitStack() as later:
        host.start(_server(protocol, host, plan.sessions))
        # On the guest's side of the cable: what the host of a guest sees of it.
        eager, settled = (
            later.enter_context(host.in_guest(partial(_watcher, with_idle(builtin(), pause))))
            for pause in (EAGER, SETTLED)
        )
        watch = {arm: settled if arm == "settled" else eager for arm in ARMS}
        wanted = ClientsWanted(protocol=protocol, sessions=plan.sessions, seed=plan.seed)
        clients = later.enter_context(ClientProcess(host, wanted))
        time.sleep(_WARM_UP_S)
        for number in range(plan.rounds):
            for arm in chance.sample(ARMS, len(ARMS)):
                time.sleep(chance.uniform(0.0, 1.0))
                stops.append(_stop(plan, arm, host, watch[arm]))
                time.sleep(_AFTER_S)
            latest = {stop.arm: stop for stop in stops[-len(ARMS) :]}
            tell(
                f"{protocol} {number + 1} of {plan.rounds}: "
                + ", ".join(
                    f"{arm} {latest[arm].unsuitable} unsuitable" for arm in ("plain", "gated", "settled")
                )
                + f", waited {latest['gated'].waited_s:.1f} s and {latest['settled'].waited_s:.1f} s"
            )
        return clients.finish(), stops


def _watcher(definitions: Sequence[Definition]) -> _Watcher:
    tracker = Tracker(definitions, guest_macs=[parse_mac(layout.GUEST_MAC)])
    return TapWatcher(layout.GUEST_INTERFACE, layout.GUEST_MAC, tracker, SystemClock())


def _stop(plan: ProtocolsPlan, arm: str, host: ServerHost, watcher: _Watcher) -> Stop:
    waited_s, timed_out = 0.0, False
    if arm in ("gated", "settled"):
        waited_s, timed_out = _wait_for_gate(plan, watcher)
        time.sleep(RELEASE_S)
    begin_s = time.monotonic()
    if arm == "none":
        time.sleep(plan.pause_s)
    else:
        host.hold()
        time.sleep(max(0.0, begin_s + plan.pause_s - time.monotonic()))
        host.go_on()
    return Stop(
        arm=arm,
        begin_s=begin_s,
        end_s=time.monotonic(),
        unsuitable=watcher.unsuitable_at(begin_s),
        waited_s=waited_s,
        timed_out=timed_out,
    )


def _wait_for_gate(plan: ProtocolsPlan, watcher: _Watcher) -> tuple[float, bool]:
    """Hold as a migration does, with memory that always fits; seconds waited, and whether time was up."""
    config = PolicyConfig(name="backoff", backoff=_LADDER, max_wait_s=plan.max_wait_s)
    limits = gate.GateConfig.of(config, max_downtime_s=plan.pause_s)
    memory = gate.MemoryStats(
        remaining_bytes=0, dirty_bytes_s=0, bandwidth_bytes_s=plan.link.rate_bytes_s, since_sync_s=0
    )
    began_s = time.monotonic()
    policy = make_policy(config).begin(began_s)
    while True:
        look = Observation.of(watcher.snapshot())
        policy = policy.observe(look)
        decision = gate.decide(memory, look, policy, limits, time.monotonic(), began_s)
        if decision.decision is gate.Decision.RELEASE:
            return decision.waited_s, decision.timed_out
        time.sleep(_LOOK_S)

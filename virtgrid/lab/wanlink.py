"""The process of one link: the WAN between the sites, or a delayed cable to the client.

Where the kernel has netem, veth and netem do the work and this process only takes orders. Otherwise it
carries the frames itself between TAPs (one in each namespace) and plays wire, delay and queue.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from virtgrid.core.errors import LabError, UsageError
from virtgrid.lab import daemon
from virtgrid.lab.control import ControlServer
from virtgrid.lab.layout import LinkSpec
from virtgrid.lab.wan import Direction, LinkState
from virtgrid.net import netns, shaping, syscalls
from virtgrid.net.tap import open_tap

_FRAME_LIMIT_BYTES: Final = 70000
_BURST: Final = 64
"""Frames taken from one port before the others and the clock get their turn."""
_IDLE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One end of a link: an interface in a namespace. name is the site's."""

    name: str
    namespace: str
    interface: str


class Carrier(Protocol):
    """What moves the frames."""

    kind: str

    def descriptors(self) -> list[int]: ...

    def wake_s(self) -> float | None: ...

    def step(self, readable: list[int]) -> None: ...

    def apply(self, state: LinkState) -> None: ...

    def counters(self) -> list[dict[str, Any]]: ...


class TapCarrier:
    """Frames carried by this process. With more than two ports it learns MACs, as a switch does."""

    kind = "user-space"

    def __init__(self, ports: list[Port], spec: LinkSpec) -> None:
        self._ports = {open_tap(port.namespace, port.interface): port for port in ports}
        self._paths = {
            (source, target): Direction(spec=spec)
            for source in self._ports
            for target in self._ports
            if source != target
        }
        self._targets = {port: [other for other in self._ports if other != port] for port in self._ports}
        self._seen: dict[bytes, int] = {}

    def descriptors(self) -> list[int]:
        return list(self._ports)

    def wake_s(self) -> float | None:
        return min((due for path in self._paths.values() if (due := path.due_s()) is not None), default=None)

    def step(self, readable: list[int]) -> None:
        for port in readable:
            if port in self._ports:
                self._take(port)
        now_s = time.monotonic()
        for (_, target), path in self._paths.items():
            queue = path.in_flight
            while queue and queue[0][0] <= now_s:
                _, frame = queue.popleft()
                try:
                    os.write(target, frame)
                except OSError:  # the far side does not take it: interface down, or its queue full
                    path.dropped += 1

    def _take(self, port: int) -> None:
        read, targets = os.read, self._targets[port]
        only = self._paths[port, targets[0]] if len(targets) == 1 else None
        for _ in range(_BURST):
            try:
                frame = read(port, _FRAME_LIMIT_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                # Somebody deleted the TAP. Going on would spin on it; `lab up` starts a new link.
                raise LabError(f"{self._ports[port].interface} is gone", cause=str(error)) from error
            now_s = time.monotonic()
            if only is not None:
                only.push(now_s, frame)
                continue
            self._seen[frame[16:22]] = port
            known = self._seen.get(frame[10:16])
            for target in targets if known is None else (known,):
                if target != port:
                    self._paths[port, target].push(now_s, frame)

    def apply(self, state: LinkState) -> None:
        now_s = time.monotonic()
        for path in self._paths.values():
            path.change(now_s, state.spec, cut=state.cut)

    def counters(self) -> list[dict[str, Any]]:
        return [
            {"from": self._ports[source].name, "to": self._ports[target].name, **path.counters()}
            for (source, target), path in self._paths.items()
        ]


class NetemCarrier:
    """Two ports on one veth pair, each end with the kernel's netem. The pair is left when this ends."""

    kind = "netem"

    def __init__(self, ports: list[Port], spec: LinkSpec) -> None:
        self._ports = ports
        left, right = ports
        shaping.make_pair(left.namespace, left.interface, right.namespace, right.interface)
        self.apply(LinkState(base=spec))

    def descriptors(self) -> list[int]:
        return []

    def wake_s(self) -> float | None:
        return None

    def step(self, readable: list[int]) -> None:
        return

    def apply(self, state: LinkState) -> None:
        spec = state.spec
        for port in self._ports:
            shaping.set_netem(
                port.namespace,
                port.interface,
                rate_bytes_s=spec.rate_bytes_s,
                delay_s=spec.rtt_s / 2,
                queue_s=spec.queue_s,
                loss=1.0 if state.cut else spec.loss,
            )

    def counters(self) -> list[dict[str, Any]]:
        left, right = self._ports
        return [
            {"from": a.name, "to": b.name, **shaping.netem_counters(a.namespace, a.interface)}
            for a, b in ((left, right), (right, left))
        ]


class LinkProcess:
    """Takes orders, keeps time, lets the carrier do its work."""

    def __init__(self, carrier: Carrier, state: LinkState, where: Path) -> None:
        self._carrier, self._state = carrier, state
        self._control = ControlServer(where, self._order)

    def _order(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        now_s = time.monotonic()
        match order["do"]:
            case "status":
                return {
                    "kind": self._carrier.kind,
                    **self._state.as_dict(now_s),
                    "directions": self._carrier.counters(),
                }
            case "base":
                self._state.base = LinkSpec(**order["spec"])
            case "break":
                try:
                    self._state.break_(now_s, dict(order))
                except UsageError as error:
                    return {"error": error.what}
            case "restore":
                self._state.restore()
            case other:
                return {"error": f"unknown order {other}"}
        self._carrier.apply(self._state)
        return self._state.as_dict(now_s)

    def run(self) -> None:
        """Until the process is ended."""
        control, carrier, state = self._control, self._carrier, self._state
        while True:
            wake_s = carrier.wake_s()
            if state.until_s is not None:
                wake_s = min(wake_s, state.until_s) if wake_s is not None else state.until_s
            wait_s = _IDLE_S if wake_s is None else min(_IDLE_S, max(0.0, wake_s - time.monotonic()))
            # select(), not epoll: its time-out is fine enough for frames
            readable, _, _ = select.select(carrier.descriptors() + control.descriptors(), [], [], wait_s)
            carrier.step(readable)
            for descriptor in readable:
                if descriptor in control.descriptors():
                    control.ready(descriptor)
            if state.expired(time.monotonic()):
                state.restore()
                carrier.apply(state)


def main() -> None:
    """``python -m virtgrid.lab.wanlink SOCKET PLAN FD``; the plan is JSON: home, ports, spec."""
    where, plan, report = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    daemon.detach()
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # At home in a namespace of the lab, whence `lab down` finds this process whatever happens.
        netns.enter(plan["home"])
        ports = [Port(**port) for port in plan["ports"]]
        spec = LinkSpec(**plan["spec"])
        with contextlib.suppress(OSError):
            syscalls.finest_timers()
        with contextlib.suppress(OSError):
            # A link that waits behind a busy guest for the processor would show a jitter no wire has.
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        gc.disable()  # no cycles arise here, and a collection would hold frames up
        carrier: Carrier
        if len(ports) == 2 and shaping.has_netem(plan["home"]):
            carrier = NetemCarrier(ports, spec)
        else:
            carrier = TapCarrier(ports, spec)
        process = LinkProcess(carrier, LinkState(base=spec), where)
    except BaseException as error:
        daemon.report_failure(report, error)
        raise
    daemon.report_ready(report)
    try:
        process.run()
    except LabError as error:
        sys.exit("\n".join(error.lines()))


if __name__ == "__main__":
    main()

"""``virtgrid bench network``: what a sandbox costs on the network. The paper's tables 2 and 3 (section
4.1), today.

TCP and UDP by iperf3 between two sites of a lab over one kind of cable, at 941 Mbit/s offered and as fast
as it goes: bare (from network namespace to network namespace), from sandbox to sandbox, the same over a
VXLAN, and from bare to a QEMU guest. The four take turns in every round, so that what else the machine
does hits all of them.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from virtgrid.bench.netstage import Wire, wires
from virtgrid.bench.result import Figure, Result, figure
from virtgrid.bench.where import accelerator, environment
from virtgrid.core.errors import LabError
from virtgrid.lab.lab import Lab, take_down
from virtgrid.lab.layout import LabConfig
from virtgrid.lab.stage import Tell, lab_name

PROTOCOLS: Final = ("tcp", "udp")
RATES: Final = {"941": 941_000_000, "max": 0}
"""Offered, in bits per second; 0 is unlimited."""
BARE: Final = "bare"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """rounds: how often each combination is measured, each time for so many seconds."""

    rounds: int = 5
    seconds: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run. bits_s: what arrived. sender_cpu, receiver_cpu: of one processor, by the programs' own
    account;
    machine_cpu: busy share of all processors meanwhile. lost: share of UDP datagrams."""

    wire: str
    protocol: str
    rate: str
    round: int
    bits_s: float
    sender_cpu: float
    receiver_cpu: float
    machine_cpu: float
    lost: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "wire": self.wire, "protocol": self.protocol, "rate": self.rate, "round": self.round,
            "mbit_s": round(self.bits_s / 1e6, 1), "sender_cpu": round(self.sender_cpu, 4),
            "receiver_cpu": round(self.receiver_cpu, 4), "machine_cpu": round(self.machine_cpu, 4),
            "lost": None if self.lost is None else round(self.lost, 4),
        }  # fmt: skip


# --- what iperf3 says: pure -----------------------------------------------------------------


def arrived(said: Mapping[str, Any], protocol: str) -> tuple[float, float | None]:
    """(bits per second that arrived, lost share) from iperf3's JSON. Errors: LabError with its words."""
    if "error" in said:
        raise LabError("iperf3 could not measure", cause=str(said["error"]))
    received = said["end"]["sum_received"]
    lost = float(received["lost_percent"]) / 100 if protocol == "udp" else None
    return float(received["bits_per_second"]), lost


def cpu(said: Mapping[str, Any]) -> tuple[float, float]:
    """(sender, receiver): share of one processor, user and system."""
    used = said["end"]["cpu_utilization_percent"]
    return float(used["host_total"]) / 100, float(used["remote_total"]) / 100


def figures_of(samples: Sequence[Sample]) -> tuple[Figure, ...]:
    """For every combination: throughput against bare in the same round, and the CPU shares beside it."""
    found: list[Figure] = []
    names = list(dict.fromkeys(sample.wire for sample in samples))
    for protocol in PROTOCOLS:
        for rate in RATES:
            rows = [s for s in samples if (s.protocol, s.rate) == (protocol, rate)]
            bare = {s.round: s for s in rows if s.wire == BARE}
            for name in names:
                mine = [s for s in rows if s.wire == name]
                found += _figures(name, protocol, rate, mine, bare)
    return tuple(found)


def _figures(
    name: str, protocol: str, rate: str, mine: Sequence[Sample], bare: Mapping[int, Sample]
) -> list[Figure]:
    median = statistics.median
    found = []
    if name != BARE:
        ratios = [s.bits_s / bare[s.round].bits_s for s in mine if s.round in bare and bare[s.round].bits_s]
        found.append(figure(f"{protocol}_{name}_vs_bare_{rate}", ratios, of=median))
    found.append(
        figure(f"{protocol}_{name}_mbit_s_{rate}", [s.bits_s / 1e6 for s in mine], "Mbit/s", of=median)
    )
    for what in ("sender", "receiver", "machine"):
        values = [getattr(s, f"{what}_cpu") for s in mine]
        peers = [getattr(s, f"{what}_cpu") for s in bare.values()] if name != BARE else []
        peer = median(peers) if peers else None
        found.append(figure(f"{protocol}_{name}_cpu_{what}_{rate}", values, "share", of=median, peer=peer))
    if protocol == "udp":
        found.append(figure(f"udp_{name}_lost_{rate}", [s.lost for s in mine], "share", of=median))
    return found


def busy_share(before: Sequence[int], after: Sequence[int]) -> float:
    """Of all processors, from two readings of /proc/stat's first line (user, nice, system, idle, iowait,
    …).
    """
    spent = [b - a for a, b in zip(before, after, strict=True)]
    total = sum(spent[:8])  # guest time is in user's already
    return 1 - (spent[3] + spent[4]) / total if total > 0 else 0.0


# --- measuring ------------------------------------------------------------------------------


def measure(plan: NetworkPlan, tell: Tell) -> Result:
    """Bring up a lab with its cables, sandboxes and guest, measure, and take it down."""
    name = lab_name("bench")
    samples: list[Sample] = []
    try:
        lab = Lab.up(LabConfig(name=name), tell)
        where = environment(accelerator=accelerator(), seconds=plan.seconds, rounds=plan.rounds)
        with wires(lab, tell) as found:
            for number in range(1, plan.rounds + 1):
                for protocol in PROTOCOLS:
                    for rate in RATES:
                        turn = number % len(found)
                        for wire in [*found[turn:], *found[:turn]]:
                            sample = _sample(wire, protocol, rate, number, plan.seconds)
                            samples.append(sample)
                            tell(
                                f"round {number}: {protocol} {wire.name} at {rate}:"
                                f" {sample.bits_s / 1e6:.0f} Mbit/s"
                            )
    finally:
        take_down(name)
    raw = {"samples": [sample.as_dict() for sample in samples]}
    return Result(bench="network", environment=where, figures=figures_of(samples), raw=raw)


def _sample(wire: Wire, protocol: str, rate: str, number: int, seconds: int) -> Sample:
    words = ["-t", str(seconds), "-J"]
    if protocol == "udp":
        words += ["-u", "-b", str(RATES[rate])]
    else:
        # Without the first second, in which TCP is still looking for its window.
        words += ["-O", "1", *(["-b", str(RATES[rate])] if RATES[rate] else [])]
    with wire.serving(), _Busy() as busy:
        said = wire.client(words, timeout_s=seconds + 30)
        machine_cpu = busy.last(seconds)
    bits_s, lost = arrived(said, protocol)
    sender, receiver = cpu(said)
    return Sample(
        wire=wire.name, protocol=protocol, rate=rate, round=number, bits_s=bits_s, sender_cpu=sender,
        receiver_cpu=receiver, machine_cpu=machine_cpu, lost=lost,
    )  # fmt: skip


class _Busy:
    """How busy the machine was lately: /proc/stat read twenty times a second, beside what is measured.

    Not read at both ends of the command: entering a sandbox takes a second that is not the network's.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[float, list[int]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="busy")

    def __enter__(self) -> _Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        while True:
            self._seen.append((time.monotonic(), _stat()))
            if self._stop.wait(0.05):
                return

    def last(self, seconds: float) -> float:
        """The busy share of so many seconds until now."""
        begin_s = time.monotonic() - seconds
        before = min(self._seen, key=lambda seen: abs(seen[0] - begin_s))
        return busy_share(before[1], _stat())


def _stat() -> list[int]:
    with open("/proc/stat") as file:  # noqa: PTH123 - read between two moments: quick
        return [int(word) for word in file.readline().split()[1:]]

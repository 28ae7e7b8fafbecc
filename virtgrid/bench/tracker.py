"""``virtgrid bench tracker``: what following connections costs, in a file and in the path of the packets.

Offline: one seeded capture in frames of MTU size, one in large frames, one of small requests alone.
A round lets the replay engine, the dpkt loop and tshark read the same file one after the other, so
that what the machine does meanwhile hits all three; a ratio is that of one round. All times are CPU
times. What each of them counted is compared with what was written: who counts less is not faster.
Live: tracker_live.py.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from virtgrid.bench import tracker_capture as captures
from virtgrid.bench import tracker_live
from virtgrid.bench import tracker_peers as peers
from virtgrid.bench.result import Figure, Goal, Result, at_least, at_most, figure
from virtgrid.bench.tracker_live import LivePlan
from virtgrid.bench.tracker_peers import Counted
from virtgrid.bench.where import environment
from virtgrid.core.errors import RefusedError
from virtgrid.tracker.pcap import read_blocks
from virtgrid.tracker.replay import replay_blocks
from virtgrid.tracker.tracker import Tracker

Tell = Callable[[str], None]
T = TypeVar("T")
#: What a round trip through the whole bench leaves on the disk, per unit of scale.
_DISK_BYTES: Final = 2_200_000_000
#: Within a tenth of linear and of flat.
_SAME: Final = 1.1
_LATER_S: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerPlan:
    """What to measure. scale: of the captures (1: about 850,000 packets and 1 GB, each)."""

    scale: float = 1.0
    rounds: int = 5
    idle: tuple[int, ...] = (0, 1_000, 10_000, 100_000)
    seed: int = 1


@dataclass(slots=True)
class _Sums:
    """CPU seconds per round, by who read the file; and what they counted."""

    ours: list[float] = field(default_factory=list)
    dpkt: list[float] = field(default_factory=list)
    tshark: list[float] = field(default_factory=list)
    counted: dict[str, tuple[int, int]] = field(default_factory=dict)

    def times(self, peer: Sequence[float]) -> list[float]:
        """How many times as fast as a peer we were, round by round."""
        return [theirs / ours for theirs, ours in zip(peer, self.ours, strict=False)]


def measure(plan: TrackerPlan, tell: Tell, *, offline: bool = True, live: LivePlan | None = None) -> Result:
    """Measure on captures, and with ``live`` under a load. Errors: RefusedError (no room, no root)."""
    where = environment(scale=plan.scale, rounds=plan.rounds, seed=plan.seed, tshark=peers.tshark_version())
    raw: dict[str, Any] = {}
    figures: list[Figure] = []
    if offline:
        with _directory(plan) as directory:
            figures += _against_peers(plan, directory, tell, raw)
            figures += _costs(plan, directory, tell, raw)
    if live is not None:
        found, raw["live"] = tracker_live.measure(tell, live)
        figures += found
    return Result(bench="tracker", environment=where, figures=tuple(figures), raw=raw)


@contextmanager
def _directory(plan: TrackerPlan) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="virtgrid-bench-") as name:
        directory = Path(name)
        wanted = round(_DISK_BYTES * plan.scale)
        if shutil.disk_usage(directory).free < wanted:
            raise RefusedError(
                f"the captures need {wanted / 1e9:.1f} GB in {directory.parent}",
                hint="TMPDIR=DIRECTORY, or --quick",
            )
        yield directory


# -- beside dpkt and tshark ----------------------------------------------------------------


def _against_peers(plan: TrackerPlan, directory: Path, tell: Tell, raw: dict[str, Any]) -> list[Figure]:
    figures = []
    for name, payload, goals in (
        ("mtu", captures.MTU_PAYLOAD, (at_least(8), at_least(20))),
        ("large", captures.LARGE_PAYLOAD, (at_least(3), None)),
    ):
        path = directory / f"{name}.pcap"
        tell(f"writing a capture in frames of {'MTU size' if name == 'mtu' else 'up to 64 KB'}")
        written = captures.write(path, captures.MIXED, scale=plan.scale, payload=payload, seed=plan.seed)
        sums = _Sums()
        for number in range(plan.rounds):
            _round(path, sums)
            tell(f"round {number + 1} of {plan.rounds}, {name}: {_said(sums)}")
        rate = [written.packets / spent for spent in sums.ours]
        figures.append(figure(f"replay_{name}_packets_s", rate, "packets/s", of=statistics.median))
        figures.append(_ratio(f"replay_{name}_vs_dpkt", sums.times(sums.dpkt), goals[0], sums.dpkt, written))
        if goals[1] is not None:
            figures.append(
                _ratio(f"replay_{name}_vs_tshark", sums.times(sums.tshark), goals[1], sums.tshark, written)
            )
        raw[name] = {
            "packets": written.packets,
            "bytes": written.bytes,
            "exchanges": written.exchanges,
            "counted": sums.counted,
            "cpu_s": {"virtgrid": sums.ours, "dpkt": sums.dpkt, "tshark": sums.tshark},
        }
        wrong = {who: seen for who, seen in sums.counted.items() if seen != (written.exchanges,) * 2}
        if wrong:
            raw[name]["miscounted"] = wrong
            tell(f"{name}: of {written.exchanges} exchanges were counted: {wrong}")
        path.unlink()
    return figures


def _ratio(
    name: str, samples: list[float], goal: Goal, spent: list[float], written: captures.Written
) -> Figure:
    """peer: packets per second of what is compared with."""
    found = figure(name, samples, "×", of=statistics.median, goal=goal)
    if not spent:
        return found
    theirs = written.packets / statistics.median(spent)
    return Figure(
        name=found.name, value=found.value, unit=found.unit, spread=found.spread, n=found.n,
        peer=theirs, ratio=found.value, goal=found.goal, ok=found.ok,
    )  # fmt: skip


def _round(path: Path, sums: _Sums) -> None:
    """Everybody reads the file once; whoever is not installed does not."""
    ours, seen = _timed(lambda: _replayed(path))
    sums.ours.append(ours)
    sums.counted["virtgrid"] = seen
    spent_s, loop = _timed(lambda: peers.dpkt_loop(path))
    if loop is not None:
        sums.dpkt.append(spent_s)
        sums.counted["dpkt"] = loop
    if shutil.which("tshark"):
        shark, spent_s = peers.tshark(path)
        sums.tshark.append(spent_s)
        sums.counted["tshark"] = shark


def _said(sums: _Sums) -> str:
    parts = [f"{sums.ours[-1]:.2f} s"]
    parts.append(f"dpkt {sums.dpkt[-1]:.2f} s" if sums.dpkt else "dpkt is not installed")
    parts.append(f"tshark {sums.tshark[-1]:.2f} s" if sums.tshark else "tshark is not installed")
    return ", ".join(parts)


def _replayed(path: Path) -> Counted:
    """As ``virtgrid track --read`` does it."""
    with path.open("rb") as file:
        found = replay_blocks(read_blocks(file, str(path)), timeline=False)
    return Counted(sum(c.view.requests for c in found), sum(c.view.responses for c in found))


def _timed(what: Callable[[], T]) -> tuple[float, T]:
    """(CPU seconds, the result); garbage of before is taken out before."""
    gc.collect()
    begin_s = time.process_time()
    found = what()
    return time.process_time() - begin_s, found


# -- what it grows with --------------------------------------------------------------------


def _costs(plan: TrackerPlan, directory: Path, tell: Tell, raw: dict[str, Any]) -> list[Figure]:
    path = directory / "small.pcap"
    written = captures.write(
        path, (captures.SMALL,), scale=plan.scale, payload=captures.MTU_PAYLOAD, seed=plan.seed
    )
    spent = [_timed(lambda: _replayed(path))[0] for _ in range(plan.rounds)]
    heads = [2 * written.exchanges / one for one in spent]
    tell(f"small requests: {statistics.median(heads):,.0f} heads/s")
    path.unlink()
    few, many = (
        captures.write(
            directory / f"{name}.pcap", captures.MIXED, scale=plan.scale * share,
            payload=captures.MTU_PAYLOAD, seed=plan.seed,
        )
        for name, share in (("few", 0.125), ("many", 0.5))
    )  # fmt: skip
    growth = [_each(many) / _each(few) for _ in range(plan.rounds)]
    tell(f"with {many.packets / few.packets:.1f} × the packets: {statistics.median(growth):.2f} × each")
    flat = _idle(plan, many.path, tell, raw)
    return [
        figure("heads_per_s", heads, "heads/s", of=statistics.median),
        figure("cost_vs_packets", growth, "×", of=statistics.median, goal=at_most(_SAME)),
        figure("cost_vs_idle_connections", flat, "×", of=statistics.median, goal=at_most(_SAME)),
    ]


def _each(written: captures.Written) -> float:
    """CPU seconds per packet."""
    return _timed(lambda: _replayed(written.path))[0] / written.packets


def _idle(plan: TrackerPlan, path: Path, tell: Tell, raw: dict[str, Any]) -> list[float]:
    """The same traffic beside idle connections: cost with the most of them / with the fewest, by round."""
    spent: dict[int, list[float]] = {}
    trackers = {count: _with_idle(count) for count in plan.idle}
    for _ in range(plan.rounds):
        for count, tracker in trackers.items():
            spent.setdefault(count, []).append(_timed(partial(_fed, tracker, path))[0])
    raw["idle_cpu_s"] = {str(count): times for count, times in spent.items()}
    least, most = min(spent), max(spent)
    for count, times in spent.items():
        tell(f"beside {count:,} idle connections: {statistics.median(times):.3f} s")
    return [many / few for few, many in zip(spent[least], spent[most], strict=True)]


def _with_idle(count: int) -> Tracker:
    """A tracker of so many connections, each with one answered request behind it."""
    tracker = Tracker(connections_max=2 * count + 100_000)
    for block in captures.idle_blocks(count):
        tracker.feed_block(block)
    # All that the idle ones had to wait for is over.
    tracker.tick(_LATER_S)
    tracker.changes()
    return tracker


def _fed(tracker: Tracker, path: Path) -> None:
    with path.open("rb") as file:
        for block in read_blocks(file, str(path)):
            tracker.feed_block(block)
    tracker.changes()

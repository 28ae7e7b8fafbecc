"""`virtgrid bench tracker`: its captures are what they say, and everybody counts the same in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from virtgrid.bench import tracker_capture as captures
from virtgrid.bench import tracker_peers as peers
from virtgrid.bench.tracker import TrackerPlan, measure
from virtgrid.tracker.pcap import read_blocks, read_frames
from virtgrid.tracker.replay import replay, replay_blocks
from virtgrid.tracker.tracker import Tracker


@pytest.fixture(params=[captures.MTU_PAYLOAD, captures.LARGE_PAYLOAD], ids=["mtu", "large"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> captures.Written:
    return captures.write(tmp_path / "x.pcap", captures.MIXED, scale=0.002, payload=request.param, seed=3)


def test_the_same_seed_gives_the_same_capture(written: captures.Written, tmp_path: Path) -> None:
    payload = captures.LARGE_PAYLOAD
    first = captures.write(tmp_path / "1.pcap", captures.MIXED, scale=0.001, payload=payload, seed=7)
    again = captures.write(tmp_path / "2.pcap", captures.MIXED, scale=0.001, payload=payload, seed=7)
    assert first[1:] == again[1:]
    assert first.path.read_bytes() == again.path.read_bytes()
    assert written.path.stat().st_size == 24 + 16 * written.packets + written.bytes


def test_everybody_counts_what_was_written(written: captures.Written) -> None:
    with written.path.open("rb") as file:
        found = replay_blocks(read_blocks(file, "x"))
    expected = (written.exchanges, written.exchanges)
    assert (sum(c.view.requests for c in found), sum(c.view.responses for c in found)) == expected
    assert {(c.end, c.view.gaps) for c in found} == {("closed", 0)}
    assert peers.dpkt_loop(written.path) == expected
    if shutil.which("tshark"):
        counted, spent_s = peers.tshark(written.path)
        assert counted == expected
        assert spent_s > 0


def test_blocks_say_what_single_frames_say(written: captures.Written) -> None:
    with written.path.open("rb") as file:
        one_by_one = replay(read_frames(file, "x"))
    with written.path.open("rb") as file:
        assert replay_blocks(read_blocks(file, "x")) == one_by_one


def test_idle_connections_are_idle() -> None:
    tracker = Tracker()
    for block in captures.idle_blocks(300):
        tracker.feed_block(block)
    assert (tracker.total, tracker.unsuitable) == (300, 0)


def test_the_bench_tells_every_figure_and_counts_right() -> None:
    told: list[str] = []
    found = measure(TrackerPlan(scale=0.002, rounds=1, idle=(0, 50)), told.append)
    figures = {one.name: one for one in found.figures}
    assert set(figures) == {
        "replay_mtu_packets_s", "replay_mtu_vs_dpkt", "replay_mtu_vs_tshark", "replay_large_packets_s",
        "replay_large_vs_dpkt", "heads_per_s", "cost_vs_packets", "cost_vs_idle_connections",
    }  # fmt: skip
    without_tshark = {"replay_mtu_vs_tshark"} if not shutil.which("tshark") else set()
    assert {name for name, one in figures.items() if one.value is None} == without_tshark
    assert "miscounted" not in found.raw["mtu"]
    assert "miscounted" not in found.raw["large"]
    assert told

"""What the lab's WAN promises: the rate and the delay that were asked for, and faults while it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import pytest
from lab_traffic import echo_s, reachable, throughput_bytes_s

from virtgrid.core.errors import LabError
from virtgrid.lab.lab import Lab
from virtgrid.lab.layout import LinkSpec
from virtgrid.lab.wan import LinkState
from virtgrid.lab.wanlink import NetemCarrier, Port
from virtgrid.net import netns, shaping
from virtgrid.net.link import Links

pytestmark = pytest.mark.lab


def _eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("rate_bytes_s", "rtt_s"), [(12.5e6, 0.1), (1.25e6, 0.02)])
def test_rate_and_delay_are_what_was_asked(mended_lab: Lab, rate_bytes_s: float, rtt_s: float) -> None:
    alice, bob = mended_lab.site("alice"), mended_lab.site("bob")
    mended_lab.change_wan(rate_bytes_s=rate_bytes_s, rtt_s=rtt_s)
    measured = []
    for _ in range(3):  # a busy machine can spoil one measurement
        echo = echo_s(alice, bob, bob.wan_address)
        rate = throughput_bytes_s(alice, bob, bob.wan_address, seconds=4, skip_s=2)
        measured.append((echo, rate))
        if rtt_s <= echo < rtt_s * 1.15 + 0.002 and 0.85 < rate / rate_bytes_s <= 1.0:
            return
    raise AssertionError(f"asked {rate_bytes_s} B/s, {rtt_s} s; measured {measured}, load {os.getloadavg()}")


def test_the_counters_tell_the_bytes_of_each_direction(mended_lab: Lab) -> None:
    alice, bob = mended_lab.site("alice"), mended_lab.site("bob")
    before = mended_lab.wan_counters()
    payload = 4 << 20
    script = (
        "import socket\n"
        "s = socket.create_server(('10.99.0.2', 4444)); print(flush=True); p, _ = s.accept()\n"
        "n = 0\n"
        "while n < 4 << 20: n += len(p.recv(1 << 20))\n"
        "p.sendall(b'k')\n"
    )
    sink = subprocess.Popen(bob.argv([sys.executable, "-c", script]), stdout=subprocess.PIPE, text=True)
    assert sink.stdout is not None
    sink.stdout.readline()
    source = (
        "import socket\n"
        "s = socket.create_connection(('10.99.0.2', 4444)); s.sendall(bytes(4 << 20)); s.recv(1)\n"
    )
    alice.run([sys.executable, "-c", source])
    sink.wait(30)
    after = mended_lab.wan_counters()
    there = after["alice", "bob"]["bytes"] - before["alice", "bob"]["bytes"]
    back = after["bob", "alice"]["bytes"] - before["bob", "alice"]["bytes"]
    assert payload < there < payload * 1.1
    assert back < payload * 0.1
    assert mended_lab.wan_bytes() >= there + back


def test_a_cut_loses_everything_until_it_is_restored(mended_lab: Lab) -> None:
    alice, bob = mended_lab.site("alice"), mended_lab.site("bob")
    assert reachable(alice, bob.wan_address)
    mended_lab.cut_wan()
    assert mended_lab.wan_status()["cut"]
    assert not reachable(alice, bob.wan_address)
    mended_lab.restore_wan()
    assert not mended_lab.wan_status()["cut"]
    assert _eventually(lambda: reachable(alice, bob.wan_address))


def test_a_cut_for_a_while_mends_itself(mended_lab: Lab) -> None:
    mended_lab.cut_wan(for_s=0.5)
    status = mended_lab.wan_status()
    assert status["cut"]
    assert 0 < status["restored_in_s"] <= 0.5
    assert _eventually(lambda: not mended_lab.wan_status()["cut"])
    alice, bob = mended_lab.site("alice"), mended_lab.site("bob")
    assert _eventually(lambda: reachable(alice, bob.wan_address))


def test_the_client_segment_stays_when_the_wan_is_cut(mended_lab: Lab) -> None:
    mended_lab.cut_wan()
    for site in mended_lab.sites:
        assert reachable(mended_lab.client, site.segment_address)


def test_slowing_keeps_what_was_not_mentioned(mended_lab: Lab) -> None:
    mended_lab.change_wan(rtt_s=0.03)
    mended_lab.change_wan(loss=0.1)
    status = mended_lab.wan_status()
    assert (status["rtt_s"], status["loss"], status["rate_bytes_s"]) == (0.03, 0.1, 125e6)
    mended_lab.restore_wan()
    status = mended_lab.wan_status()
    assert (status["rtt_s"], status["loss"]) == (0.0, 0.0)


def test_a_senseless_order_is_refused_and_the_link_goes_on(mended_lab: Lab) -> None:
    with pytest.raises(LabError):
        mended_lab.change_wan(rate_bytes_s=1)
    with pytest.raises(LabError):
        mended_lab.cut_wan(for_s=-1)
    assert reachable(mended_lab.site("alice"), mended_lab.site("bob").wan_address)


def test_where_the_kernel_has_netem_it_is_given_the_work(
    lab_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lab's kernel may lack netem, so tc is played here; the veth pair is real."""
    said: list[tuple[str, str]] = []

    def tc(namespace: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        said.append((namespace, " ".join(words)))
        shown = '[{"kind": "netem", "bytes": 5, "packets": 2, "drops": 1}]'
        return subprocess.CompletedProcess([], 0, shown, "")

    monkeypatch.setattr(shaping, "_tc", tc)
    ends = [f"vg-{lab_name}-{site}" for site in ("alice", "bob")]
    for namespace in ends:
        netns.create(namespace)
    assert shaping.has_netem(ends[0])
    spec = LinkSpec(rate_bytes_s=1.25e6, rtt_s=0.04, queue_s=0.1)
    ports = [Port(name=end.rpartition("-")[2], namespace=end, interface="wan0") for end in ends]
    carrier = NetemCarrier(ports, spec)
    for namespace in ends:
        with Links(namespace) as links:
            links.up("wan0")
    said.clear()
    carrier.apply(LinkState(base=spec))
    words = "qdisc replace dev wan0 root netem limit 100 rate 10000000bit delay 20000us"
    assert said == [(end, words) for end in ends]
    said.clear()
    carrier.apply(LinkState(base=spec, cut=True))
    assert all(text.endswith("loss 100%") for _, text in said)
    assert [way["bytes"] for way in carrier.counters()] == [5, 5]
    NetemCarrier(ports, spec)  # again, as after the death of the link's process: the pair is kept

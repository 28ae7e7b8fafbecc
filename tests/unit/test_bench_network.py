"""bench network reads iperf3 right and compares each wire with bare of the same round."""

from __future__ import annotations

import pytest

from virtgrid.bench.network import Sample, arrived, busy_share, cpu, figures_of
from virtgrid.core.errors import LabError

SAID = {
    "end": {
        "sum_received": {"bits_per_second": 9.0e8, "lost_percent": 4.5},
        "sum": {"bits_per_second": 9.41e8},
        "cpu_utilization_percent": {"host_total": 25.0, "remote_total": 50.0},
    }
}


def _sample(wire: str, number: int, mbit_s: float, protocol: str = "tcp", rate: str = "max") -> Sample:
    return Sample(
        wire=wire, protocol=protocol, rate=rate, round=number, bits_s=mbit_s * 1e6, sender_cpu=0.5,
        receiver_cpu=0.25, machine_cpu=0.75, lost=0.1 if protocol == "udp" else None,
    )  # fmt: skip


def test_what_arrived_counts_not_what_was_sent() -> None:
    assert arrived(SAID, "tcp") == (9.0e8, None)
    assert arrived(SAID, "udp") == (9.0e8, 0.045)
    assert cpu(SAID) == (0.25, 0.5)


def test_iperf3_s_own_words_are_the_cause() -> None:
    with pytest.raises(LabError) as caught:
        arrived({"error": "unable to connect"}, "tcp")
    assert caught.value.cause == "unable to connect"


def test_each_round_is_compared_with_its_own_bare() -> None:
    samples = [
        _sample("bare", 1, 1000), _sample("sandbox", 1, 900), _sample("bare", 2, 500),
        _sample("sandbox", 2, 500), _sample("bare", 3, 800), _sample("sandbox", 3, 400),
        _sample("bare", 1, 100, "udp", "941"), _sample("sandbox", 1, 50, "udp", "941"),
    ]  # fmt: skip
    found = {one.name: one for one in figures_of(samples)}
    ratio = found["tcp_sandbox_vs_bare_max"]
    assert (ratio.value, ratio.spread, ratio.n) == (0.9, (0.5, 1.0), 3)
    assert found["tcp_bare_mbit_s_max"].value == 800
    assert found["tcp_sandbox_cpu_sender_max"].ratio == 1
    assert found["udp_sandbox_vs_bare_941"].value == 0.5
    assert found["udp_sandbox_lost_941"].value == 0.1
    assert "tcp_bare_vs_bare_max" not in found
    assert found["tcp_sandbox_mbit_s_941"].value is None, "what was not measured has no value"


def test_idle_and_waiting_are_not_busy() -> None:
    assert busy_share([0] * 10, [10, 0, 10, 60, 20, 0, 0, 0, 5, 0]) == pytest.approx(0.2)
    assert busy_share([1] * 10, [1] * 10) == 0

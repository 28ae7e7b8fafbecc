"""What is said to the kernel about classes and filters is what is read back."""

from __future__ import annotations

import pytest

from virtgrid.net import guarantee, htb, tcmsg
from virtgrid.net.guarantee import AddFilter, Class, Flow, SetClass, Share


@pytest.mark.parametrize("rate", [1, 12_500_000, 0xFFFFFFFF, 12_500_000_000])
def test_a_class_is_read_as_it_was_written(rate: int) -> None:
    one = Class(parent=0x100, rate_bytes_s=rate, ceil_bytes_s=2 * rate, prio=1)
    assert htb.read_class(htb.write_class(7, 0x102, one)) == (0x102, one)


@pytest.mark.parametrize(
    "network", ["10.1.0.0/16", "0.0.0.0/0", "192.0.2.1/32", "fd00::/20", "2001:db8::1/128"]
)
def test_a_filter_is_read_as_it_was_written(network: str) -> None:
    peer = "2001:db8::1" if ":" in network else "192.0.2.1"
    share = Share(
        rate_bytes_s=1000, networks=(network,), flows=(Flow(vni=77, peers=(peer,), rate_bytes_s=10),)
    )
    added = [step for step in guarantee.plan([share], None) if isinstance(step, AddFilter)]
    assert len(added) == 2
    for step in added:
        read = htb.read_filter(htb.write_filter(7, step.match, step.minor))
        assert read is not None
        assert read[:2] == (step.match, step.minor)


def test_other_peoples_filters_are_not_read() -> None:
    head = tcmsg.head(7, parent=htb.ROOT, rank=10, protocol=0x0800)
    table = tcmsg.attribute(tcmsg.KIND, b"u32\0") + tcmsg.attribute(
        tcmsg.OPTIONS, tcmsg.attribute(4, b"\1\0\0\0")
    )
    assert htb.read_filter(head + table) is None
    assert htb.read_filter(head + tcmsg.attribute(tcmsg.KIND, b"flower\0")) is None
    assert htb.read_filter(head) is None


def test_what_is_beyond_the_numbers_of_a_tree_is_left_out() -> None:
    flows = tuple(Flow(vni=vni, peers=("192.0.2.1",), rate_bytes_s=1) for vni in range(1, 300))
    share = Share(rate_bytes_s=10_000, networks=("10.0.0.0/8",), flows=flows)
    steps = guarantee.plan([share] * 300, None)
    minors = {step.minor for step in steps if isinstance(step, SetClass)}
    assert max(minors) < 0xFFFF
    assert len([minor for minor in minors if minor >> 8 == 1]) == 2 + guarantee.FLOWS_LIMIT

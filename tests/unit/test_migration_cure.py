"""What a silent guest's signs are taken for."""

from __future__ import annotations

import pytest

from virtgrid.migration.cure import Signs, silence
from virtgrid.virt import domxml
from virtgrid.virt.domain import Activity, DomainState, Position

RUNNING = Position(state=DomainState.RUNNING)
MAC = "52:54:00:00:00:01"


@pytest.mark.parametrize(
    ("signs", "why", "text"),
    [
        (Signs(position=Position(state=DomainState.CRASHED)), "crashed", "its kernel panicked"),
        (Signs(position=Position(state=DomainState.PAUSED, reason="I/O error")), "paused", "I/O error"),
        (Signs(position=Position(state=DomainState.SHUTOFF)), "gone", "was shut off there"),
        (Signs(position=Position(state=DomainState.ABSENT)), "gone", "was shut off there"),
        (Signs(position=RUNNING, unplugged=True, got=0, sent=0, busy=1.0), "unplugged", "link is down"),
        (Signs(position=RUNNING, got=0, sent=0, busy=1.0), "network", "nothing sent to it arrives"),
        (Signs(position=RUNNING, got=4, sent=4, busy=0.1), "network", "its answers do not arrive"),
        (Signs(position=RUNNING, got=4, sent=0, busy=0.99), "hung", "without end"),
        (Signs(position=RUNNING, got=4, sent=0, busy=0.02), "mute", "down within"),
        (Signs(position=RUNNING), "mute", "sends nothing"),
    ],
)  # fmt: skip
def test_signs(signs: Signs, why: str, text: str) -> None:
    found = silence("web", MAC, "bob", signs)
    assert found.why == why
    assert text in found.text
    assert found.text.startswith("web arrived on bob")
    assert found.hint


def test_busy_is_a_share_of_all_processors() -> None:
    def done(at_s: float, used_s: float) -> Activity:
        return Activity(at_s=at_s, used_s=used_s, vcpus=2, got=0, sent=0)

    assert done(11.0, 6.0).busy_since(done(10.0, 5.0)) == 0.5
    assert done(11.0, 7.5).busy_since(done(10.0, 5.0)) == 1.0  # QEMU's own threads count too
    assert done(10.0, 5.0).busy_since(done(10.0, 5.0)) == 0.0


INTERFACES = """<domain><devices>
<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/></interface>
<interface type='bridge'><mac address='52:54:00:00:00:02'/><link state='up'/></interface>
</devices></domain>"""


@pytest.mark.parametrize("mac", ["52:54:00:00:00:01", "52:54:00:00:00:02"])
def test_an_interface_with_its_link_down(mac: str) -> None:
    device = domxml.interface_xml(INTERFACES, mac, link="down")
    assert device is not None
    assert device.count("<link ") == 1
    assert "<link state='down'/>".replace("'", '"') in device
    assert mac in device
    assert domxml.interface_xml(INTERFACES, "52:54:00:00:00:03", link="down") is None

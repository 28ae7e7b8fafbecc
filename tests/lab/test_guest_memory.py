"""Memory written while a guest migrates must arrive: the test that notices an emulator that loses it.

Stock QEMU 7.2 without KVM fails it: pages written without pause are not sent again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from virtgrid.lab import guest
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.lab import Lab

pytestmark = pytest.mark.lab

ANSWER_S = 60.0


@pytest.fixture
def busy(lab: Lab) -> Iterator[GuestSpec]:
    spec = GuestSpec(name="gmem", address="10.77.0.113", memcheck_pages=48, dirty_bytes_s=1_000_000)
    guest.boot(lab, "alice", spec)
    yield spec
    for site in ("alice", "bob"):
        if any(status.name == spec.name for status in guest.guests(lab, site)):
            guest.destroy(lab, site, spec.name)
        (lab.site(site).images / spec.disk_name).unlink(missing_ok=True)


def test_no_write_is_lost_in_a_migration(lab: Lab, busy: GuestSpec) -> None:
    guest.wait_answering(lab, busy, deadline_s=ANSWER_S)
    alice, bob = lab.site("alice"), lab.site("bob")
    target = bob.images / busy.disk_name
    target.touch()
    os.truncate(target, (alice.images / busy.disk_name).stat().st_size)
    words = ["migrate", "--live", "--copy-storage-all", "--persistent", "--undefinesource", busy.name]
    # From inside the site, as its administrator would: 'bob' is a name of the lab's.
    guest.run(alice.argv(["virsh", "-q", "-c", "qemu:///system", *words, bob.tls_uri]), deadline_s=120)
    arrived = guest.memcheck_state(lab, busy, deadline_s=ANSWER_S)
    end_s = time.monotonic() + ANSWER_S
    # What was lost is found in the round after the one it was lost in.
    while guest.memcheck_state(lab, busy).iterations <= arrived.iterations:
        assert time.monotonic() < end_s, "the checker stands still"
        time.sleep(0.1)
    assert guest.memcheck_state(lab, busy).corrupt == 0
    for site in ("alice", "bob"):
        assert "CORRUPT" not in guest.console(lab, site, busy.name)
    assert [
        status.site
        for site in ("alice", "bob")
        for status in guest.guests(lab, site)
        if status.name == busy.name
    ] == ["bob"]

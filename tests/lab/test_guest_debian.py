"""The Debian guest of the benchmarks: Apache and PHP behind the small guest's URLs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from virtgrid.lab import guest
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.image import ensure_image
from virtgrid.lab.lab import Lab

# Bootstrapping Debian takes minutes, once for each set of package versions.
pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]


@pytest.fixture
def debian(lab: Lab) -> Iterator[GuestSpec]:
    ensure_image("debian")
    spec = GuestSpec(name="gdeb", image="debian", address="10.77.0.114", memory_mib=384, memcheck_pages=16)
    guest.boot(lab, "alice", spec)
    yield spec
    guest.destroy(lab, "alice", "gdeb")


def test_it_serves_the_same_urls_checks_its_memory_and_obeys_the_power_button(
    lab: Lab, debian: GuestSpec
) -> None:
    guest.wait_answering(lab, debian, deadline_s=180)
    for path, least_bytes in (
        ("/page/49.html", 2_000),
        ("/img/199.gif", 1_000),
        ("/download/9.bin", 4 * 2**20),
        ("/slow/page/0.html", 2_000),
        ("/slow/900k/page/0.html", 2_000),
    ):
        # Bytes that are no text are replaced: not every one of them becomes a character.
        assert len(guest.http_get(lab, debian.address, path, deadline_s=60)) >= least_bytes / 4, path
    state = guest.memcheck_state(lab, debian, deadline_s=60)
    assert (state.pages, state.corrupt) == (16, 0)
    guest.virsh(lab.site("alice"), "shutdown", "gdeb")
    end_s = time.monotonic() + 120
    while any(status.name == "gdeb" and status.running for status in guest.guests(lab, "alice")):
        assert time.monotonic() < end_s, "it did not power off"
        time.sleep(0.2)

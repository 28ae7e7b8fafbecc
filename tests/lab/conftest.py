"""Fixtures: for tests that migrate, one guest a module; for tests of the capture, a tap of their own;
for those of the grid, a host.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from capture_site import GUEST_MAC, Site, Watcher, in_namespace, site_up
from gridsite import GridSite, grid_hosts
from migrating import Stage, staged
from pair import pair as pair

from virtgrid.core.clock import SystemClock
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.lab import Lab
from virtgrid.net.addresses import parse_mac
from virtgrid.net.capture import TapWatcher
from virtgrid.tracker.tracker import Tracker


@pytest.fixture(scope="module")
def module_stage(lab: Lab) -> Iterator[Stage]:
    # Short: sockets live below it.
    home = Path(tempfile.mkdtemp(prefix=f"vg{os.getpid()}-"))
    try:
        with staged(lab, home, GuestSpec(name="mover", address="10.77.0.60", memory_mib=128)) as stage:
            yield stage
    finally:
        shutil.rmtree(home)


@pytest.fixture
def stage(module_stage: Stage) -> Iterator[Stage]:
    """A running guest in a whole lab; what a test breaks is mended for the next."""
    module_stage.mend()
    yield module_stage
    module_stage.mend(guest_too=False)


@pytest.fixture
def grid(mended_lab: Lab) -> Iterator[GridSite]:
    """A site as a host of the grid, its virtgridd running; nothing of it is left."""
    here, there = mended_lab.sites
    with grid_hosts([(here, there)]) as (host,):
        yield host


@pytest.fixture
def site() -> Iterator[Site]:
    """A tap with a web server behind it."""
    with site_up() as site:
        yield site


@pytest.fixture
def watcher(site: Site) -> Iterator[Watcher]:
    def start() -> Watcher:
        tracker = Tracker(guest_macs=[parse_mac(GUEST_MAC)])
        return TapWatcher("tap0", GUEST_MAC, tracker, SystemClock())

    with in_namespace(site.host, start) as watcher:
        yield watcher

"""Fixtures for all tests: one lab per process, with a name of its own, taken down at the end."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from virtgrid.lab import faults
from virtgrid.lab.lab import Lab, obstacle, take_down
from virtgrid.lab.layout import LabConfig, LinkSpec
from virtgrid.lab.slurm import cluster
from virtgrid.lab.slurm.cluster import Cluster

_numbers = itertools.count()


@pytest.fixture(scope="session")
def lab_possible() -> None:
    """Skip, with the reason, where a lab cannot be."""
    if reason := obstacle():
        pytest.skip(reason)


@pytest.fixture
def lab_name(lab_possible: None) -> Iterator[str]:
    """A name no other test run uses; whatever was made under it is taken down in the end."""
    name = f"t{os.getpid()}x{next(_numbers)}"
    yield name
    take_down(name)


@pytest.fixture(scope="session")
def lab(lab_possible: None) -> Iterator[Lab]:
    """Two sites, alice and bob, on a fast WAN (1 Gbit/s, no delay), for the whole test run.

    A test that breaks something puts it back (``mended_lab`` does).
    """
    name = f"t{os.getpid()}"
    try:
        yield Lab.up(LabConfig(name=name, wan=LinkSpec(rate_bytes_s=125e6)))
    finally:
        take_down(name)


@pytest.fixture
def mended_lab(lab: Lab) -> Iterator[Lab]:
    """The session's lab for a test that breaks things: mended before and after."""
    _mend(lab)
    yield lab
    _mend(lab)


def _mend(lab: Lab) -> None:
    Lab.up(lab.config)
    lab.restore_wan()
    for site in lab.sites:
        faults.unlimit_disk(site)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A Slurm of four nodes for the whole test run; who breaks something puts it back."""
    if reason := cluster.obstacle():
        pytest.skip(reason)
    with Cluster() as made:
        yield made

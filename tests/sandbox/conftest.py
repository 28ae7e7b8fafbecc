"""A host with sandboxes: site alice of the session's lab, with a template and accounts of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hosting import SandboxHost

from virtgrid.lab.lab import Lab


@pytest.fixture(scope="session")
def sandbox_site(lab: Lab) -> Iterator[SandboxHost]:
    with SandboxHost(lab.site("alice"), template=f"t{os.getpid()}") as host:
        yield host


@pytest.fixture
def host(sandbox_site: SandboxHost) -> Iterator[SandboxHost]:
    """The host without any sandbox; what a test leaves is destroyed after it."""
    sandbox_site.clear()
    yield sandbox_site
    sandbox_site.clear()

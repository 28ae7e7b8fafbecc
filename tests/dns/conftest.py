"""Fixtures: a BIND for the module's tests that do not break it, and one of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bind import Bind, running


@pytest.fixture
def bind(tmp_path: Path) -> Iterator[Bind]:
    """A BIND whose records are as they were, at its first serial number."""
    home = tmp_path / "bind"
    home.mkdir()
    with running(home) as bind:
        yield bind

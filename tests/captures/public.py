"""The public captures: where they are, their index, and running one through the tracker.

They are not part of the repository; they lie in ``shared/captures`` beside it, or in
$VIRTGRID_CAPTURES. Without them the tests that need them say so and skip.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from virtgrid.tracker.pcap import Frame, read_frames
from virtgrid.tracker.replay import Replayed, replay

DIRECTORY = Path(os.environ.get("VIRTGRID_CAPTURES") or Path(__file__).parents[3] / "shared/captures")
needed = pytest.mark.skipif(
    not (DIRECTORY / "index.json").exists(),
    reason=f"the public captures are not at {DIRECTORY} (set VIRTGRID_CAPTURES)",
)


@cache
def index() -> list[dict[str, Any]]:
    """One row for every file; empty without the captures."""
    if not (DIRECTORY / "index.json").exists():
        return []
    rows: list[dict[str, Any]] = json.loads((DIRECTORY / "index.json").read_text())
    return rows


def frames(name: str) -> list[Frame]:
    with (DIRECTORY / name).open("rb") as file:
        return list(read_frames(file, name, damaged=lambda text: None))


def run(name: str) -> list[Replayed]:
    return replay(frames(name))

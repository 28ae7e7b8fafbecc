"""Public captures read in blocks and frame by frame: the same connections, verdicts and times."""

from __future__ import annotations

from typing import Any

import pytest
from public import DIRECTORY, index, needed, run

from virtgrid.tracker.pcap import read_blocks
from virtgrid.tracker.replay import replay_blocks


@needed
@pytest.mark.parametrize("row", index(), ids=lambda row: row["file"])
def test_blocks_say_of_a_capture_what_its_frames_say(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtgrid.tracker.tracker._FEW_FRAMES", 1)
    with (DIRECTORY / row["file"]).open("rb") as file:
        found = replay_blocks(read_blocks(file, row["file"], damaged=lambda text: None))
    assert found == run(row["file"])

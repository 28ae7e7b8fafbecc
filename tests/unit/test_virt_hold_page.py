"""The reference page of the hold says what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from virtgrid.virt.holdpage import diagram, refreshed
from virtgrid.virt.switchover import TRANSITIONS, HoldMode

PAGE = Path(__file__).parents[2] / "docs/reference/hold.md"


def test_the_reference_page_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == refreshed(page), "run: python -m virtgrid.virt.holdpage docs/reference/hold.md"


def test_the_diagram_has_every_transition_and_no_other() -> None:
    drawn = [line.split() for line in diagram().splitlines() if "-->" in line and "[*]" not in line]
    assert {(before, after) for before, _, after in drawn} == {
        (before.value, after.value) for before, following in TRANSITIONS.items() for after in following
    }


def test_every_state_is_explained() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{mode}` |" in page for mode in HoldMode)


def test_a_page_without_the_places_is_refused() -> None:
    with pytest.raises(ValueError, match="diagram"):
        refreshed("# The hold\n")

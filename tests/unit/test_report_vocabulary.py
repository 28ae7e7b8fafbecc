"""The journal's reference page says what the vocabulary says."""

from __future__ import annotations

from pathlib import Path

from virtgrid.report.vocabulary import journal_markdown


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs/reference/journal.md"
    assert page.read_text(encoding="utf-8") == journal_markdown(), (
        "run: python -m virtgrid.report.vocabulary > docs/reference/journal.md"
    )

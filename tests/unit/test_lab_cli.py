"""`virtgrid lab`: bad words end with one sentence and the right status before anything is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from virtgrid.cli.lab import app, parse_share
from virtgrid.core.errors import UsageError
from virtgrid.lab.layout import DIRECTORY_VARIABLE


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["up", "--sites", "9"], 2),
        (["up", "--rate", "100"], 2),
        (["up", "--rate", "fast"], 2),
        (["up", "--rtt", "1h"], 2),
        (["up", "--queue", "0"], 2),
        (["up", "--lab", "a-b"], 2),
        (["up", "--lab", "../x"], 2),
        (["down", "--lab", "../x"], 2),
        (["status", "--lab", "X"], 2),
        (["break", "wan"], 2),
        (["break", "wan", "--restore", "--cut"], 2),
        (["break", "wan", "--for", "3s"], 2),
        (["break", "wan", "--cut", "--for", "0"], 2),
        (["break", "wan", "--loss", "200%"], 2),
        (["break", "wan", "--loss", "100%"], 2),
        (["break", "disk", "alice"], 2),
        (["break", "disk", "alice", "--free", "lots"], 2),
        (["break", "libvirtd", "alice", "--stop", "--cont"], 2),
        (["exec", "alice"], 2),
        (["nonsense"], 2),
        (["status", "--lab", "nothere"], 4),
        (["exec", "--lab", "nothere", "alice", "--", "true"], 4),
        (["break", "wan", "--cut", "--lab", "nothere"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_bad_words_have_their_status(
    words: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "labs"))
    monkeypatch.setattr("virtgrid.cli.lab.require_possible", lambda: None)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == status, result.output
    assert "this is a bug" not in result.output
    assert not (tmp_path / "labs").exists()


def test_a_share_is_a_percentage_or_a_fraction() -> None:
    assert parse_share("10%") == pytest.approx(0.1)
    assert parse_share("0.25") == 0.25
    for text in ("x", "-1%", "101%", "nan", ""):
        with pytest.raises(UsageError):
            parse_share(text)


def test_taking_down_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "labs"))
    monkeypatch.setattr("virtgrid.cli.lab.take_down", lambda *_, **__: False)
    result = CliRunner().invoke(app, ["down", "--lab", "nothere"])
    assert result.exit_code == 0
    assert "nothing to take down" in result.output

"""``virtgrid lab guest``: bad words are refused in one sentence, before anything happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from virtgrid.cli.guest import app


@pytest.fixture(autouse=True)
def own_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIRTGRID_LAB_DIR", str(tmp_path / "labs"))
    monkeypatch.setenv("VIRTGRID_CACHE_DIR", str(tmp_path / "images"))


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["build", "bsd"], 2),
        (["boot", "--name", "../x"], 2),
        (["boot", "--memory", "1MiB"], 2),
        (["boot", "--memory", "much"], 2),
        (["boot", "--vcpus", "0"], 2),
        (["boot", "--address", "10.0.0.999"], 2),
        (["boot", "--disk-format", "vdi"], 2),
        (["boot", "--memcheck", "-1"], 2),
        (["boot", "--dirty", "100"], 2),
        (["boot", "--wait", "-1"], 2),
        (["boot", "--lab", "nowhere"], 4),
        (["list", "--lab", "nowhere"], 4),
        (["destroy", "web", "--lab", "nowhere"], 4),
    ],
)
def test_bad_words_have_their_exit_status_and_touch_nothing(
    words: list[str], status: int, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == status
    assert "bug" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_with_json_an_error_is_an_object() -> None:
    result = CliRunner().invoke(app, ["list", "--lab", "nowhere", "--json"])
    assert json.loads(result.stdout)["error"] == "VG-NOT-FOUND"

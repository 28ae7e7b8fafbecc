"""Output helpers: errors become their exit status, tables line up, nothing steers a terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import pytest
from rich.cells import cell_len

from virtgrid.cli.output import plain, print_error, run, table
from virtgrid.core import errors


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class Thing:
    name: Colour
    when: datetime
    parts: tuple[float, ...]


ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.VirtgridError)
]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_ends_with_its_own_status(
    kind: type[errors.VirtgridError], capsys: pytest.CaptureFixture[str]
) -> None:
    @run
    def command() -> None:
        raise kind("it broke", where="web1 is on hostA", cause="a\nb", hint="mend it")

    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == kind.exit_status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"error: it broke; web1 is on hostA.  [{kind.code}]"
    assert "  hint: mend it" in err


def test_with_json_the_error_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    @run
    def command(*, as_json: bool) -> None:
        raise errors.NotFoundError("nothing there")

    with pytest.raises(SystemExit):
        command(as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_status"] == 4
    assert err == ""


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    @run
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 130


@pytest.mark.parametrize("debug", ["0", "1"])
def test_a_bug_says_so_and_shows_its_trace_only_on_request(
    debug: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTGRID_DEBUG", debug)

    @run
    def command() -> None:
        raise ZeroDivisionError("division by zero")

    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 1
    err = capsys.readouterr().err
    assert "this is a bug" in err
    assert ("Traceback" in err) == (debug == "1")


def test_an_error_from_the_other_side_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(errors.MigrationFailedError("bad [bold]x[/bold]", cause="libvirt: \x1b[2J\x07 gone"))
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "\x07" not in err
    assert "[bold]x[/bold]" in err


def test_tables_line_up_and_cut_only_what_may_be_cut() -> None:
    rows = [("a", "日本", None), ("bb", "x" * 60, 3)]
    lines = table(("ID", "WAITING FOR", "N"), rows, shrink="WAITING FOR", width=40)
    assert all(cell_len(line) <= 40 for line in lines)
    assert lines[0].startswith("ID  WAITING FOR")
    assert lines[1].rstrip().endswith("-")
    assert lines[2].endswith("…  3")
    assert "x" * 60 in table(("ID", "WAITING FOR", "N"), rows, shrink="WAITING FOR")[2], (
        "piped: nothing is cut"
    )


def test_anything_of_ours_becomes_json() -> None:
    thing = Thing(Colour.RED, datetime(2026, 1, 1, tzinfo=UTC), (0.1 + 0.2,))
    assert plain({"a": thing, "b": Path("/x")}) == {
        "a": {"name": "red", "when": "2026-01-01T00:00:00.000+00:00", "parts": [0.3]},
        "b": "/x",
    }

"""``virtgrid migration list | show | report``: what is recorded can be read; bad input changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.unit.journals import KINDS, sample_journal, write_journal
from virtgrid.cli.migration import app
from virtgrid.core.process import process_started
from virtgrid.report.files import brief, writer_alive


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory with a migration of every kind, web0 the newest, and one that is held now."""
    monkeypatch.setenv("VIRTGRID_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("NO_COLOR", "1")
    directory = tmp_path / "migrations"
    now = datetime.now(UTC)
    for number, kind in enumerate(KINDS):
        start = now - timedelta(days=number, minutes=3)
        # No process has this pid: pid_max is at most 2^22.
        write_journal(directory, sample_journal(kind, domain=f"web{number}", start=start, pid=2**22 + 1))
    held = sample_journal("crashed", domain="held", start=now - timedelta(seconds=30), pid=os.getpid())
    mine = {**held[0].fields, "pid_started": process_started(os.getpid())}
    write_journal(directory, [replace(held[0], fields=mine), *held[1:]])
    return directory


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_the_table_has_every_migration_newest_first(state: Path) -> None:
    result = call("list")
    assert result.exit_code == 0
    head, *rows = result.stdout.splitlines()
    assert head.split("  ")[0] == "ID"
    assert [row.split()[1] for row in rows] == ["held", *(f"web{n}" for n in range(len(KINDS)))]
    assert "hostA → hostB" in rows[0]
    assert "holding" in rows[0]
    assert "http 10.9.0." in rows[0]
    assert "158 ms" in rows[1]
    assert rows[3].endswith("- (on hostA)")
    assert "lost" in rows[-1]


def test_since_leaves_out_the_older(state: Path) -> None:
    assert len(call("list", "--since", "36h").stdout.splitlines()) == 1 + 3
    assert len(json.loads(call("list", "--since", "90d", "--json").stdout)) == len(KINDS) + 1


@pytest.mark.parametrize("text", ["soon", "-3d", "", "9999999999999d"])
def test_a_time_that_is_none_is_a_usage_error(state: Path, text: str) -> None:
    result = call("list", f"--since={text}")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_json_tells_the_same(state: Path) -> None:
    rows = json.loads(call("list", "--json").stdout)
    held = rows[0]
    assert held["state"] == "holding"
    assert held["waiting_for"]["text"].startswith("http 10.9.0.")
    assert held["waiting_for"]["hold_max_s"] == 30.0
    assert [row["exit_status"] for row in rows[1:]] == [0, 0, 1, 6, 5, None]
    assert rows[1]["downtime_s"] == pytest.approx(0.158)


def test_nothing_recorded_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTGRID_STATE_DIR", str(tmp_path / "none"))
    result = call("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert json.loads(call("list", "--json").stdout) == []
    assert not (tmp_path / "none").exists()


def test_one_broken_journal_does_not_hide_the_others(state: Path) -> None:
    (state / "20261122T014412-torn.jsonl").write_text("{}\nnot json\n{}\n")
    (state / "20261122T014413-empty.jsonl").touch()
    result = call("list")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1 + 1 + len(KINDS)
    assert "torn.jsonl:1" in result.stderr


def test_show_takes_a_domain_or_an_id(state: Path) -> None:
    by_name = call("show", "web0")
    assert by_name.exit_code == 0
    migration_id = by_name.stdout.split()[1]
    assert call("show", migration_id).stdout == by_name.stdout
    for expected in ("web0 runs on hostB", "158 ms", "held", "answering"):
        assert expected in by_name.stdout
    failed = call("show", "web2").stdout
    assert "client socket is closed" in failed
    assert "look at hostB" in failed


def test_show_json_and_events(state: Path) -> None:
    shown = json.loads(call("show", "web0", "--json").stdout)
    assert shown["verdict"].startswith("web0 runs on hostB")
    assert [phase["phase"] for phase in shown["phases"]][:3] == ["preflight", "prepare", "storage"]
    events = [json.loads(line) for line in call("show", "web0", "--events", "--json").stdout.splitlines()]
    assert events[0]["event"] == "started"
    assert events[-1]["event"] == "finished"
    assert len(call("show", "web0", "--events").stdout.splitlines()) == len(events)


@pytest.mark.parametrize("reference", ["nosuch", "../../etc/passwd", "20261122T014412-../x", "*", ""])
@pytest.mark.parametrize("command", ["show", "report"])
def test_an_unknown_reference_is_not_found(state: Path, command: str, reference: str) -> None:
    before = sorted(state.iterdir())
    result = call(command, reference)
    assert result.exit_code == 4
    assert "no migration" in result.stderr
    as_json = json.loads(call(command, reference, "--json").stdout)
    assert (as_json["error"], as_json["exit_status"]) == ("VG-NOT-FOUND", 4)
    assert sorted(state.iterdir()) == before


def test_report_writes_html_beside_the_journal_and_says_where(state: Path) -> None:
    result = call("report", "web0")
    assert result.exit_code == 0
    path = Path(result.stdout.strip())
    assert path.parent == state
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert path.stat().st_mode & 0o777 == 0o644


def test_report_writes_what_is_asked_for_and_nothing_else(state: Path, tmp_path: Path) -> None:
    before = sorted(state.iterdir())
    result = call("report", "web2", "--png", str(tmp_path / "r.png"), "--html", str(tmp_path / "r.html"))
    assert result.stdout.splitlines() == [str(tmp_path / "r.png"), str(tmp_path / "r.html")]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(state.iterdir()) == before
    data = json.loads(call("report", "web2", "--json").stdout)
    assert data["state"] == "failed"
    assert data["storage_series"]
    assert sorted(state.iterdir()) == before


@pytest.mark.parametrize("where", ["no/such/directory/r.html", "directory"])
def test_a_place_that_cannot_be_written_is_refused(state: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "directory").mkdir()
    result = call("report", "web0", "--html", str(tmp_path / where))
    assert result.exit_code == 3
    assert "report" in result.stderr
    assert list((tmp_path / "directory").iterdir()) == []


def test_a_journal_is_listed_from_its_first_and_last_line(state: Path) -> None:
    path = next(state.glob("*-web0.jsonl"))
    assert [record.event for record in brief(path)] == ["started", "finished"]
    crashed = next(state.glob("*-web5.jsonl"))
    assert len(brief(crashed)) > 100


def test_the_writer_is_known_by_pid_and_start() -> None:
    me = process_started(os.getpid())
    assert me is not None
    assert writer_alive(os.getpid(), me)
    assert writer_alive(os.getpid(), None)
    assert not writer_alive(os.getpid(), me - 1), "another process had this pid"
    assert process_started(2**22 + 1) is None


def test_a_closed_pipe_is_no_error(state: Path) -> None:
    script = "from virtgrid.cli.migration import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "show", "web0", "--events"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()

"""The journal keeps what was written, survives a killed writer, and cannot be led astray."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from virtgrid.core import journal as journals
from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.core.events import EVENTS, PHASES, TERMINAL, Record
from virtgrid.core.journal import Follower, Journal

TOO_EARLY = '{"v":1,"at":"0001-01-01T00:00:00+10:00","mono_s":1,"event":"note"}'
NOW = datetime(2026, 11, 22, 1, 44, 12, tzinfo=UTC)


def written(path: Path, count: int = 3) -> Path:
    with Journal(path, FakeClock()) as journal:
        for number in range(count):
            journal.write("note", text=f"line {number}")
    return path


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_without_its_fields_or_with_unknown_ones_is_refused(event: str, tmp_path: Path) -> None:
    row = EVENTS[event]
    fields = dict.fromkeys(row.required | row.optional, "x")
    with Journal(tmp_path / "j.jsonl", FakeClock()) as journal:
        journal.write(event, **fields)
        journal.write(event, **dict.fromkeys(row.required, "x"))
        with pytest.raises(ValueError, match="undocumented"):
            journal.write(event, **fields, nobody_documented_this=1)
        for name in row.required:
            with pytest.raises(ValueError, match="missing"):
                journal.write(event, **{key: value for key, value in fields.items() if key != name})
    assert len(journals.read(tmp_path / "j.jsonl")) == 2, "what was refused was not written"


def test_an_unknown_event_is_refused(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "j.jsonl", FakeClock()) as journal,
        pytest.raises(ValueError, match="unknown event"),
    ):
        journal.write("surprise")


def test_the_vocabulary_is_consistent() -> None:
    assert set(EVENTS) >= TERMINAL
    for row in EVENTS.values():
        assert row.meaning.endswith(".")
        assert not row.required & row.optional
        assert not (row.required | row.optional) & {"v", "at", "mono_s", "event"}
    for phase in PHASES:
        assert phase in EVENTS["phase"].meaning


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "j.jsonl")
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [record["text"] for record in journals.read(path)] == ["line 0", "line 1"]


def test_a_last_line_torn_inside_a_character_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "j.jsonl")
    path.write_bytes(path.read_bytes() + '{"v":1,"event":"note","text":"→'.encode()[:-1])
    assert len(journals.read(path)) == 3


@pytest.mark.parametrize("bad", ["not json", "[]", '"x"', "{}", '{"v":1}', '{"v":"1","at":"x"}', TOO_EARLY])
def test_a_bad_line_in_the_middle_is_refused_with_its_number(tmp_path: Path, bad: str) -> None:
    path = written(tmp_path / "j.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], bad, *lines[1:]]) + "\n")
    with pytest.raises(RefusedError, match=r"j\.jsonl:2: "):
        journals.read(path)


def test_a_bad_last_line_that_was_finished_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "j.jsonl")
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(RefusedError, match=":4: "):
        journals.read(path)


@pytest.mark.parametrize(("version", "read"), [(0, True), (1, True), (2, False), (-1, False), (None, False)])
def test_a_reader_knows_its_own_version_and_the_one_before(version: int | None, read: bool) -> None:
    line = json.dumps({"v": version, "at": NOW.isoformat(), "mono_s": 1, "event": "note", "text": "x"})
    if read:
        assert journals.parse_line(line).v == version
    else:
        with pytest.raises(ValueError, match="version"):
            journals.parse_line(line)


def test_a_line_without_end_is_not_parsed() -> None:
    with pytest.raises(ValueError, match="too long"):
        journals.parse_line("x" * (1 << 21))


def test_two_migrations_never_share_a_journal(tmp_path: Path) -> None:
    written(tmp_path / "j.jsonl")
    with pytest.raises(FileExistsError):
        Journal(tmp_path / "j.jsonl", FakeClock())


def test_recovery_appends_to_what_is_there(tmp_path: Path) -> None:
    path = written(tmp_path / "j.jsonl")
    with Journal(path, FakeClock(), append=True) as journal:
        journal.write("recovered", domain="web1", on="alice", action="nothing needed doing", text="it runs")
    assert [record.event for record in journals.read(path)] == ["note"] * 3 + ["recovered"]


def test_listeners_hear_what_was_written_after_it_can_be_read(tmp_path: Path) -> None:
    path, heard = tmp_path / "j.jsonl", []

    def listener(record: Record) -> None:
        heard.append((record, journals.read(path)[-1]))

    with Journal(path, FakeClock()) as journal:
        journal.listen(listener)
        journal.write("note", text="→ ünïcode\nand a line break")
    assert heard[0][0].fields == heard[0][1].fields


def test_a_follower_gives_each_line_once_and_only_whole_ones(tmp_path: Path) -> None:
    path = written(tmp_path / "j.jsonl", 2)
    data = path.read_bytes()
    path.write_bytes(b"")
    follower, seen = Follower(path), []
    try:
        for cut in range(0, len(data), 7):
            with path.open("ab") as file:
                file.write(data[cut : cut + 7])
            seen += follower.poll()
        assert follower.poll() == []
    finally:
        follower.close()
    assert [record["text"] for record in seen] == ["line 0", "line 1"]


def test_a_migration_is_found_by_id_and_by_its_domain_s_newest(tmp_path: Path) -> None:
    old = written(tmp_path / "20260101T000000-web1.jsonl")
    new = written(tmp_path / "20260102T000000-web1.jsonl")
    written(tmp_path / "20260103T000000-web10.jsonl")
    assert journals.find("20260101T000000-web1", tmp_path) == old
    assert journals.find("web1", tmp_path) == new
    assert [path.stem[:8] for path in journals.newest_first(tmp_path)] == ["20260103", "20260102", "20260101"]


@pytest.mark.parametrize(
    "reference",
    [
        "", ".", "..", "../outside", "/etc/passwd", "20260101T000000-../../outside",
        "20260101T000000-x/../../outside",
        "*", "web*", "20260101T000000-web1.jsonl", "web1\0", "x" * 5000,
    ],
)  # fmt: skip
def test_a_reference_cannot_leave_the_directory(tmp_path: Path, reference: str) -> None:
    written(tmp_path / "outside.jsonl")
    inside = tmp_path / "migrations"
    written(inside / "20260101T000000-web1.jsonl")
    with pytest.raises(NotFoundError) as caught:
        journals.find(reference, inside)
    assert caught.value.exit_status == 4


def test_a_directory_that_is_not_there_has_no_migrations(tmp_path: Path) -> None:
    assert list(journals.newest_first(tmp_path / "none")) == []
    with pytest.raises(NotFoundError):
        journals.find("web1", tmp_path / "none")


@pytest.mark.parametrize("domain", ["web1", "a/../../b", "x" * 500, "ü ö", "..", "a:b", ""])
def test_an_id_is_a_plain_file_name_and_is_found_again(tmp_path: Path, domain: str) -> None:
    name = journals.new_id(NOW, domain)
    assert name.startswith("20261122T014412-")
    assert "/" not in name
    assert len(name) < 250
    if domain:
        path = written(tmp_path / f"{name}.jsonl")
        assert journals.find(name, tmp_path) == path


def test_the_state_directory_is_the_configured_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIRTGRID_STATE_DIR", str(tmp_path))
    assert journals.migrations_dir() == tmp_path / "migrations"
    monkeypatch.delenv("VIRTGRID_STATE_DIR")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert journals.state_dir() == Path("/var/lib/virtgrid")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert journals.state_dir() == tmp_path / "virtgrid"

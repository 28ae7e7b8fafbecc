"""A program's output on its way: the site's file, the job's journal, torn lines, limits, what comes twice."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest

from virtgrid.core.errors import RefusedError
from virtgrid.grid.crm.spool import Spool
from virtgrid.grid.grc.journal import JobJournal, read
from virtgrid.grid.grc.words import output_lines
from virtgrid.grid.messages import job as jobs
from virtgrid.grid.messages.job import JobState, JobTold, NodeTold, Wrote
from virtgrid.grid.messages.node import Finished, Output, Tell


def piece(text: str) -> Output:
    return Output.of("e1", "stdout", text.encode())


def texts(lines: str) -> list[str]:
    found = [Tell.model_validate_json(line) for line in lines.splitlines()]
    return [base64.b64decode(one.body["data"]).decode() for one in found if one.kind == "output"]


END = Finished(exec="e1", status=0)


def test_output_that_comes_twice_is_kept_once_also_after_a_kill(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "out")
    spool.take(3, piece("one"))
    spool.take(5, piece("two"))
    for _ in range(2):  # killed before it was acknowledged, and it comes again
        spool.close()
        spool = Spool(tmp_path / "out")
        assert spool.last == 5
        spool.take(5, piece("two"))
    spool.take(6, END)
    spool.take(7, piece("after its end"))
    lines, following = spool.read(0)
    assert texts(lines) == ["one", "two"]
    assert following == spool.size
    assert spool.read(following) == ("", following)
    assert spool.finished
    assert Spool(tmp_path / "out").finished


def test_a_torn_line_of_the_site_s_file_is_left_out_and_comes_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "out")
    spool.take(1, piece("whole"))
    with (tmp_path / "out").open("ab") as file:
        file.write(b'{"number":2,"kind":"out')
    again = Spool(tmp_path / "out")
    again.take(2, piece("again"))
    assert texts(again.read(0)[0]) == ["whole", "again"]


def test_output_is_read_in_pieces_of_whole_lines(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "out")
    written = [f"{number} {'x' * 30_000}" for number in range(40)]
    for number, text in enumerate(written, start=1):
        spool.take(number, piece(text))
    found: list[str] = []
    at = pieces = 0
    while at < spool.size:
        lines, at = spool.read(at)
        assert lines.endswith("\n")
        assert len(lines) <= jobs.PIECE_LIMIT
        found += texts(lines)
        pieces += 1
    assert found == written
    assert pieces > 3
    assert spool.read(at + 100) == ("", spool.size)


def test_a_program_that_writes_for_ever_fills_no_disk_and_its_end_is_known(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "out", limit_bytes=1 << 20)
    for number in range(1, 200):
        spool.take(number, piece("y" * 10_000))
    spool.take(200, END)
    assert spool.size < 1.1 * (1 << 20)
    assert spool.finished
    at, last = 0, ""
    while at < spool.size:
        lines, at = spool.read(at)
        last = lines
    assert "the rest is not kept" in texts(last)[-1]


def test_a_site_s_lines_become_the_journal_s_whatever_their_texts_hold() -> None:
    strange = Finished(exec="e1", status=None, problem="one\u2028two\x85three")
    lines = [
        Tell(number=1, kind="output", body=piece("a").model_dump(mode="json")).model_dump_json(),
        "this is none",
        Tell(number=2, kind="finished", body=strange.model_dump(mode="json")).model_dump_json(),
    ]
    text = "".join(f"{line}\n" for line in lines)
    found = output_lines(text, 10, 5.0)
    assert [one.kind for one in found] == ["output", "finished"]
    assert found[0].cursor == 10 + len(lines[0].encode()) + 1
    assert found[-1].cursor == 10 + len(text.encode())
    assert isinstance(found[-1], jobs.Finished)
    assert found[-1].problem == strange.problem
    assert output_lines("", 7, 5.0) == []


def told(state: JobState = JobState.RUNNING) -> JobTold:
    return JobTold(at_s=1.0, state=state)


async def test_a_journal_goes_on_where_it_was_and_leaves_out_a_torn_line(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "j.jsonl")
    node = NodeTold(
        at_s=1.0, site="a", node="a1", sandbox="a1-x", address="10.0.0.1", state="RUNNING", reason="r"
    )
    await journal.write(told(), node, Wrote(at_s=2.0, stream="stdout", data="", cursor=77))
    with (tmp_path / "j.jsonl").open("ab") as file:
        file.write(b'{"kind":"job","at_')
    again = JobJournal(tmp_path / "j.jsonl")
    assert (again.cursor, again.nodes) == (77, {"a1-x": ("RUNNING", "r")})
    assert again.finished is None
    end = jobs.Finished(at_s=3.0, status=4, cursor=99)
    await again.write(end)
    found = [
        jobs.JOURNAL_LINE.validate_json(line) for line in (await again.follow(0, 0.0)).lines.splitlines()
    ]
    assert [one.kind for one in found] == ["job", "node", "output", "finished"]
    assert JobJournal(tmp_path / "j.jsonl").finished == end


async def test_who_follows_a_journal_is_told_at_once_and_of_its_end(tmp_path: Path) -> None:
    journal = JobJournal(tmp_path / "j.jsonl")
    waiting = asyncio.create_task(journal.follow(0, 30.0))
    await asyncio.sleep(0)
    await journal.write(told())
    async with asyncio.timeout(10):
        first = await waiting
    assert first.lines
    assert not first.over
    waiting = asyncio.create_task(journal.follow(first.next, 30.0))
    await asyncio.sleep(0)
    await journal.close()
    async with asyncio.timeout(10):
        assert (await waiting).over
    assert read(tmp_path / "j.jsonl", 0, closed=True).over
    assert read(tmp_path / "none.jsonl", 0, closed=True).over


async def test_a_journal_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text("what is this\n")
    with pytest.raises(RefusedError, match="cannot be used"):
        JobJournal(tmp_path / "j.jsonl")

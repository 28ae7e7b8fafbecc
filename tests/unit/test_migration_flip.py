"""Letting go with what flips at the other end of a pipe: nobody waits for one that is dead or mute."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit import plans
from virtgrid.core import journal as journals
from virtgrid.core.clock import SystemClock
from virtgrid.core.journal import Journal
from virtgrid.migration import flip as flips
from virtgrid.migration.drain import Drain
from virtgrid.migration.flip import Flip
from virtgrid.net.flip import Way

WAY = Way(bridge="br0", port="vgs1", tap="vnet0", mac=plans.MAC)
NO_DRAIN = Drain(for_s=0.0, reason="")
LONG = Drain(for_s=3600.0, reason="")

# What flips, as far as its words go: argv has what it answers to arm or drain; then it ends, or does not.
_STUB = """
import json, sys
json.loads(input())
print('{"state": "ready"}', flush=True)
word = input()
for answer in sys.argv[2:]:
    print(answer.replace("WORD", word), flush=True)
if sys.argv[1] == "stay":
    input()
"""


@contextlib.asynccontextmanager
async def flipping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str
) -> AsyncIterator[tuple[Flip, Journal]]:
    run = asyncio.create_subprocess_exec

    async def stub(*_: str, **options: Any) -> asyncio.subprocess.Process:
        return await run(sys.executable, "-I", "-c", _STUB, *words, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", stub)
    monkeypatch.setattr(flips, "restore", lambda way, place: None)
    journal = Journal(tmp_path / "journal.jsonl", SystemClock())
    async with Flip(plans.plan(way=WAY), journal) as flip:
        yield flip, journal


def states(journal: Journal) -> list[str]:
    return [str(record["state"]) for record in journals.read(journal.path) if record.event == "flip"]


async def test_qemu_is_told_when_what_flips_is_armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flips, "_ANSWER_S", 3600.0)
    async with flipping(tmp_path, monkeypatch, "stay", '{"state": "armed"}') as (flip, journal):
        await flip.let_go(NO_DRAIN)
        assert states(journal) == ["ready"]


async def test_one_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flips, "_ANSWER_S", 0.05)
    async with flipping(tmp_path, monkeypatch, "stay") as (flip, _):
        await flip.let_go(LONG)


async def test_a_drain_is_told_and_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flips, "_ANSWER_S", 3600.0)
    words = ("stay", '{"state": "armed"}', '{"state": "draining"}')
    async with flipping(tmp_path, monkeypatch, *words) as (flip, journal):
        letting_go = asyncio.create_task(flip.let_go(LONG))
        while "draining" not in states(journal):  # noqa: ASYNC110  # the journal tells it to nobody
            await asyncio.sleep(0.01)
        assert not letting_go.done()
        letting_go.cancel()


async def test_a_drain_ends_with_what_flips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flips, "_ANSWER_S", 3600.0)
    words = ("go", '{"state": "armed"}', '{"state": "draining"}')
    async with flipping(tmp_path, monkeypatch, *words) as (flip, journal):
        await flip.let_go(LONG)
        assert states(journal) == ["ready", "draining", "lost"]

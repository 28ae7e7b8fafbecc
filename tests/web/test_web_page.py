"""The page in a real browser: what a person sees, on a wide screen and on a narrow one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.journals import sample_journal
from tests.web.browser import Page, browsing
from tests.web.served import bridged, driving, held_now, serving

HOSTILE = "<img src=x onerror=document.title='taken'>"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTGRID_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("VIRTGRID_RUN_DIR", str(tmp_path / "run"))


async def _text(page: Page, selector: str) -> str:
    return str(await page.value(f"document.querySelector({selector!r}).innerText"))


async def test_a_held_migration_is_shown_steered_and_gone_when_it_has_ended(tmp_path: Path) -> None:
    records = held_now()
    async with (
        serving(tmp_path) as served, served.over_tcp() as address, driving(records[0]) as driver,
        browsing() as page,
    ):  # fmt: skip
        path = served.put(records)
        served.put(sample_journal("failed", domain="unlucky"))
        await page.open(address, width=1280)
        await page.until("document.querySelector('.card .waiting')?.innerText.includes('waiting for')")
        assert await _text(page, "#link") == "live"
        assert "web1" in await _text(page, ".card h3")
        assert "● hold" in await _text(page, ".card .steps")
        assert "unsuitable" in await _text(page, ".card .legend")
        assert await page.value("document.querySelectorAll('.card .busy li').length") > 0
        assert "unlucky" in await _text(page, "#ended tbody")
        await page.until("document.querySelector('.card .history .line').getAttribute('d').includes('L')")
        if directory := os.environ.get("VIRTGRID_PICTURES"):
            await page.picture(Path(directory) / "page.png")

        # On a narrow screen nothing sticks out at the side.
        for width in (1280, 400):
            await page.resize(width)
            await page.until(f"innerWidth === {width}")
            assert await page.value("document.documentElement.scrollWidth") <= width
        if directory := os.environ.get("VIRTGRID_PICTURES"):
            await page.picture(Path(directory) / "page-narrow.png")

        # Asked first; leaving it leaves it.
        await page.value("document.querySelector('.card .release').click()")
        assert "web1" in await _text(page, "#question")
        await page.value("document.querySelector('#sure [value=no]').click()")
        await page.until("!document.querySelector('#sure').open")
        assert driver.asked == []
        await page.value("document.querySelector('.card .release').click()")
        await page.value("document.querySelector('#yes').click()")
        await page.until("document.querySelector('#told').innerText === 'release: told'")
        assert driver.asked == [("release", "the socket on this host for the web page")]

        # It ends, and goes to the others.
        ended = sample_journal()[-1]
        assert ended.event == "finished"
        served.append(path, ended)
        await page.until("!document.querySelector('.card')")
        await page.until("document.querySelector('#ended tbody').innerText.includes('web1')")
        assert page.faults == []


async def test_what_a_name_says_is_shown_and_not_done(tmp_path: Path) -> None:
    records = held_now()
    records[0].fields["domain"] = HOSTILE
    async with serving(tmp_path) as served, served.over_tcp() as address, browsing() as page:
        served.put(records)
        await page.open(address, width=1280)
        await page.until("!!document.querySelector('.card h3')")
        assert HOSTILE in await _text(page, ".card h3")
        assert await page.value("document.title") != "taken"
        assert await page.value("document.querySelector('img')") is None
        assert page.faults == []


async def test_a_host_that_does_not_answer_is_told_and_found_again(tmp_path: Path) -> None:
    async with browsing() as page, bridged(tmp_path / "web.sock") as address:
        async with serving(tmp_path) as served:
            served.put(sample_journal())
            await page.open(address, width=1280)
            await page.until("document.querySelector('#link')?.innerText === 'live'")
        await page.until("document.querySelector('#link').className.includes('bad')")
        assert "not answering" in await _text(page, "#link")
        async with serving(tmp_path):
            await page.until("document.querySelector('#link').innerText === 'live'")

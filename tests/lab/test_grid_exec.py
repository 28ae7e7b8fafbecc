"""Programs in a sandbox, through pilot and virtgridd: all of their output, their end, and nobody's memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from gridsite import GridSite

from tests.wire_ends import until
from virtgrid.grid.messages.common import Model
from virtgrid.grid.messages.node import Exec, HostEntry, Output, SetKeys, State
from virtgrid.grid.pilots import Pilot, Pilots
from virtgrid.wire.endpoint import Endpoint

pytestmark = pytest.mark.lab
BIG = 20_000_000


async def _running(grid: GridSite, pilots: Pilots, name: str) -> Pilot:
    grid.ticket(name)
    grid.start_pilot(name, Endpoint(grid.home / "crm.sock"))
    pilot = await pilots.pilot(name)
    await pilot.init(grid.init(1))
    await pilot.until(State.HOST_READY)
    keys = await pilot.get_keys()
    own = HostEntry(hostname=name, address=grid.init(1).address, **keys.model_dump())
    await pilot.set_keys(SetKeys(hosts=(own,)))
    await pilot.run()
    await pilot.until(State.RUNNING)
    return pilot


async def test_programs_are_run_as_asked_and_told_whole(grid: GridSite) -> None:
    async with Pilots(Endpoint(grid.home / "crm.sock"), [grid.key.public_key()]) as pilots:
        pilot = await _running(grid, pilots, "r42-x")
        words = 'pwd; id -un; echo "$GREETING"; printf "%s|" "$@"; echo oops >&2; exit 9'
        asked = Exec(argv=("sh", "-c", words, "sh", "a b", "", "ü\n"), env={"GREETING": "hello 'there'"})
        ran = await pilot.exec(asked)
        assert ran.stdout.decode() == "/home/gridu\ngridu\nhello 'there'\na b||ü\n|"
        assert (ran.stderr, ran.finished.status, ran.finished.problem) == (b"oops\n", 9, None)
        assert (await pilot.exec(Exec(argv=("no-such-program",)))).finished.status == 127
        assert (await pilot.exec(Exec(argv=("sh", "-c", "kill -SEGV $$")))).finished.status == 139

        eater = "import time; b = bytearray(60 << 20)\nwhile time.process_time() < 0.4: pass"
        usage = (await pilot.exec(Exec(argv=("/usr/bin/python3", "-c", eater)))).finished.usage
        assert usage is not None
        assert usage.user_s + usage.system_s > 0.3
        assert usage.elapsed_s > 0.3
        assert usage.max_rss_bytes > 60 << 20

        # Many at a time do not mix.
        many = [pilot.exec(Exec(argv=("sh", "-c", f"yes {n} | head -2000"))) for n in range(8)]
        for n, one in enumerate(await asyncio.gather(*many)):
            assert one.stdout == f"{n}\n".encode() * 2000
        await pilot.shut_down()
        await pilot.until(State.DONE)
        await grid.until_nothing_left()


async def test_a_slow_crm_holds_up_the_program_and_gets_every_byte(grid: GridSite) -> None:
    gate, taken = asyncio.Event(), [0]

    async def take(_: Pilot, note: Model) -> None:
        if isinstance(note, Output):
            await gate.wait()
            taken[0] += 1

    async with Pilots(Endpoint(grid.home / "crm.sock"), [grid.key.public_key()], taker=take) as pilots:
        pilot = await _running(grid, pilots, "r42-y")
        process = grid.pilots[-1].pid
        before = _rss_bytes(process)
        done = grid.home / "kenji" / "done"
        code = (
            "import hashlib, pathlib, sys; h = hashlib.sha256()\n"
            f"for n in range({BIG // 100_000}):\n"
            "    piece = hashlib.shake_128(str(n).encode()).digest(100_000); h.update(piece)\n"
            "    sys.stdout.buffer.write(piece)\n"
            "sys.stdout.flush(); pathlib.Path('done').write_text(h.hexdigest())"
        )
        running = asyncio.create_task(pilot.exec(Exec(argv=("/usr/bin/python3", "-c", code))))
        # Full: about a MiB with the pilot, and its program waits in a write that nobody takes.
        await until(_waits_for_room)
        assert not done.exists()
        assert _rss_bytes(process) < before + (32 << 20)
        gate.set()
        ran = await running
        assert len(ran.stdout) == BIG
        assert hashlib.sha256(ran.stdout).hexdigest() == done.read_text()
        assert taken[0] > BIG // (32 << 10)
        await pilot.shut_down()
        await pilot.until(State.DONE)


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _waits_for_room() -> bool:
    """Is there a runner whose write to its pilot waits?"""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ours = b"runner.py" in (entry / "cmdline").read_bytes()
                if ours and "sock" in (entry / "wchan").read_text():
                    return True
            except OSError:
                continue
    return False

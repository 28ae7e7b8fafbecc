"""Whether and how a migration flips its guest's frames (``net/flip.py``), undone when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from virtgrid.core.errors import VirtgridError
from virtgrid.core.journal import Journal
from virtgrid.migration.drain import Drain
from virtgrid.migration.outcome import Place
from virtgrid.migration.plan import MigrationPlan
from virtgrid.net import flip
from virtgrid.net.flip import Way
from virtgrid.net.link import Links
from virtgrid.virt.domxml import Nic

#: From the start of the process until it listens to QEMU.
_READY_S: Final = 15.0
_END_S: Final = 3.0
#: How long the release waits for what flips to be ready for it; it takes some milliseconds.
_ANSWER_S: Final = 0.25


def look_for_way(nic: Nic, destinations: tuple[str, ...]) -> tuple[Way | None, str]:
    """(The way to one of these hosts, names or addresses, why or why not); asks this host's kernel."""
    there: set[str] = set()
    for name in destinations:
        with contextlib.suppress(OSError, UnicodeError):
            there.update(
                str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            )
    try:
        with Links() as links:
            return flip.find_way(links.all(), nic.tap or "", nic.mac, tuple(there))
    except (VirtgridError, OSError) as error:
        return None, f"this host's interfaces could not be read: {error}"


class Flip:
    """The flip of one migration: ready on entering, armed when let go, put back on leaving unless it arrived.

    Without a way there is none, and the journal says why. That it fails never fails the migration.
    """

    def __init__(self, plan: MigrationPlan, journal: Journal) -> None:
        self._way, self._why = plan.facts.way, plan.facts.way_text
        self._order = {"uri": plan.request.source_uri, "uuid": plan.uuid}
        self._journal = journal
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        #: What flips has answered to the release, or will not any more.
        self._answered = asyncio.Event()
        self._gone = asyncio.Event()
        self._draining = False
        self._ending = False
        self._told_lost = False

    async def __aenter__(self) -> Flip:
        if self._way is None:
            self._journal.write("flip", state="off", text=self._why)
            return self
        # Before anything can be changed: whoever recovers must know where to look.
        self._journal.write("flip", sync=True, state="ready", text=self._why, **asdict(self._way))
        try:
            async with asyncio.timeout(_READY_S):
                await self._start(self._way)
        except (OSError, TimeoutError) as error:
            self._lost(f"what flips did not start: {error or 'it took too long'}")
            await self._end()
        return self

    async def _start(self, way: Way) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-m", "virtgrid.migration.flipper"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._say(json.dumps(self._order | {"way": asdict(way)}))
        ready = asyncio.Event()
        self._listener = asyncio.create_task(self._listen(self._process.stdout, ready.set))
        waiting = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait([self._listener, waiting], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()

    async def _listen(self, told: asyncio.StreamReader, ready: Callable[[], None]) -> None:
        """What the process tells goes into the journal."""
        with contextlib.suppress(ValueError, OSError):
            while line := await told.readline():
                match json.loads(line):
                    case {"state": "ready"}:
                        ready()
                    case {"state": "armed"} if not self._draining:
                        self._answered.set()
                    case {"state": "draining"}:
                        self._answered.set()
                        text = "new ones wait at the destination, those inside are finished"
                        self._journal.write("flip", state="draining", text=text)
                    case {"state": "given back", "frames": frames}:
                        text = "the guest goes on here for now and has what had gone elsewhere"
                        self._journal.write("flip", state="given back", text=text, frames=frames)
                    case {"state": "flipped", "after_s": after_s, "replayed": replayed}:
                        self._journal.write(
                            "flip",
                            state="flipped",
                            text="they wait at the destination",
                            after_s=after_s,
                            replayed=replayed,
                        )
                    case {"state": "put back", "frames": frames}:
                        text = "the guest goes on here"
                        self._journal.write("flip", state="put back", text=text, frames=frames)
                    case {"state": "failed", "text": text}:
                        self._lost(f"what flips failed: {text}")
        if not self._ending:
            self._lost("what flips has ended")

    def _lost(self, text: str) -> None:
        self._answered.set()  # nobody shall wait for it
        self._gone.set()
        if not self._told_lost:  # it fails, and then it ends
            self._told_lost = True
            self._journal.write("flip", state="lost", text=text)

    def _say(self, word: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(f"{word}\n".encode())

    async def let_go(self, drain: Drain) -> None:
        """The guest is about to be stopped in order to run elsewhere. Returns when QEMU is to be told.

        What waits in the tap by then QEMU still reads: it must not be told before what flips is armed.
        With a drain the frames are turned now. When what flips dies meanwhile, that is over at once.
        """
        if self._process is None:
            return
        self._draining = drain.for_s > 0
        self._say(f"drain {drain.for_s:.3f}" if self._draining else "arm")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_S):
                await self._answered.wait()
            async with asyncio.timeout(drain.lead_s):
                await self._gone.wait()

    async def arrived(self) -> None:
        """The guest runs at the destination: what was turned is left to what the bridges learn."""
        await self.leave(Place.DESTINATION)

    async def leave(self, place: Place) -> None:
        """Do what is right with the guest at this place; unknown: what is turned stays for ``recover``."""
        await self._end()
        way, self._way = self._way, None
        if way is None:
            return
        if place in (Place.UNKNOWN, Place.BOTH):
            reason = "it is not known where the guest is"
            self._journal.write("left", kind="forwarding", name=way.mac, reason=reason)
            return
        try:
            text = await asyncio.to_thread(restore, way, place)
        except (VirtgridError, OSError) as error:
            self._journal.write("left", kind="forwarding", name=way.mac, reason=str(error))
        else:
            if text:
                state = "settled" if place is Place.DESTINATION else "put back"
                self._journal.write("flip", state=state, text=text)

    async def __aexit__(self, *_: object) -> None:
        await self.leave(Place.SOURCE)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._ending = True
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.write(b"end\n")
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
                if self._listener is not None:
                    await self._listener
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        finally:
            if self._listener is not None:
                self._listener.cancel()


def restore(way: Way, place: Place) -> str | None:
    """Make this host's forwarding right for a guest that runs at ``place`` -> what was done, None if nothing.

    Errors: VirtgridError, OSError.
    """
    with Links() as links:
        if place is Place.DESTINATION:
            return "left to what the bridge learns" if flip.settle(links, way) else None
        return "its frames come here again" if flip.put_back(links, way) else None


def way_of(fields: dict[str, Any]) -> Way | None:
    """The way a ``flip`` record tells of; None when it tells of none."""
    names = ("bridge", "port", "tap", "mac")
    if not all(isinstance(fields.get(name), str) for name in names):
        return None
    return Way(**{name: fields[name] for name in names})

"""The process that flips a guest at the moment it stops: it hears QEMU itself, and does nothing else.

A process, because inside a busy one the moment would be missed by up to a quarter of a second. It is
told what to do on its standard input, a JSON line with the order and then words, and tells what
it did on its standard output, a JSON line each:

    > {"uri": …, "uuid": …, "way": {…}}        < {"state": "ready"}
    > arm     the guest is about to be stopped in order to run elsewhere      < {"state": "armed"}
    > drain 0.15    the same, in so many seconds about: turn its frames now   < {"state": "draining"}
    > end     whoever started it sees to the rest

At the guest's stop it turns its frames round, and at its going on *here* (the migration failed) it puts
them back, asked by nobody. When its parent dies it stays as long as a failing migration may need for that.

===========  ==========================================================  ===========================
where        the guest                                                   what follows
===========  ==========================================================  ===========================
idle         runs here                                                   arm: armed; drain: draining
armed        runs here, its stop is the switchover                       STOP: flipped
draining     runs here, its frames wait elsewhere                        STOP: flipped;
                                                                         too late, end: armed
flipped      is stopped, or runs elsewhere; its frames wait elsewhere    RESUME: idle
===========  ==========================================================  ===========================

From ``draining`` and ``flipped`` the way back gives the guest what went elsewhere meanwhile, in its order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from typing import Any, Final

from virtgrid.core.errors import VirtgridError
from virtgrid.core.process import be_real_time
from virtgrid.net import flip
from virtgrid.net.flip import Diverted, Swallowed, Way
from virtgrid.net.link import Links
from virtgrid.virt.connection import Hypervisor, QemuEvent

#: Frames under way when the guest stopped have all arrived by then.
_UNDER_WAY_S: Final = 0.005
_RELAX_AFTER_S: Final = 0.02
#: How often, and how many times, the tap is looked at between arming and the stop.
_LOOK_EVERY_S: Final = 0.005
_LOOKS: Final = 40
#: A guest that has not stopped so long after the end of its drain has its frames back.
_STOP_LATE_S: Final = 0.4
#: No drain is longer, whatever is asked for.
_DRAIN_MAX_S: Final = 1.0
#: How long libvirt may take to let the guest go on here when whoever drove the migration is gone.
_ORPHAN_S: Final = 60.0
_ORDER_BYTES: Final = 1 << 16


class Flipper:
    """Waits for the stop of one guest. Everything happens on the event loop."""

    def __init__(self, links: Links, way: Way, uuid: str) -> None:
        self._links = links
        self._way = way
        self._uuid = uuid
        self._swallowed: Swallowed | None = None
        self._diverted: Diverted | None = None
        self._turned_s: float | None = None
        self._flipped = False
        #: Nobody waits for the end of a drain.
        self._drained = asyncio.Event()
        self._drained.set()
        self._back = asyncio.Event()

    @property
    def _draining(self) -> bool:
        return self._turned_s is not None and not self._flipped

    async def see_it_through(self, deadline_s: float) -> None:
        """When the guest is flipped: wait until it goes on here, or else take it to have arrived there."""
        await self._drained.wait()
        if not self._flipped:
            return
        try:
            async with asyncio.timeout(deadline_s):
                await self._back.wait()
        except TimeoutError:
            flip.settle(self._links, self._way)

    def end(self) -> None:
        """Whoever started this sees to the rest, but has not what went elsewhere."""
        if self._draining:
            self._give_back("given back")

    def drain(self, for_s: float) -> None:
        """Arm, and turn the frames now; the guest stops in ``for_s``, about, or has them back."""
        self.arm()
        if self._swallowed is None or self._flipped or self._draining:
            return
        try:
            self._divert()  # again, after frames were given back
            flip.turn(self._links, self._way)
        except Exception as error:
            flip.put_back(self._links, self._way)
            _tell(state="failed", text=f"{type(error).__name__}: {error}")
            return
        self._turned_s = time.time()
        self._drained.clear()
        asyncio.get_running_loop().call_later(
            min(max(for_s, 0.0), _DRAIN_MAX_S) + _STOP_LATE_S, self._too_late, self._turned_s
        )
        _tell(state="draining")

    def _too_late(self, turned_s: float) -> None:
        if self._draining and self._turned_s == turned_s:
            self._give_back("given back")

    def _divert(self) -> None:
        """From now on what goes to the guest through the segment is kept."""
        if self._diverted is None:
            self._diverted = Diverted(self._way)
            asyncio.get_running_loop().add_reader(self._diverted, self._diverted.take)

    def _give_back(self, state: str) -> None:
        """The guest goes on here: as before, and what went elsewhere is not lost."""
        self._turned_s, self._flipped = None, False
        diverted, self._diverted = self._diverted, None
        given = 0
        try:
            if diverted is not None:
                asyncio.get_running_loop().remove_reader(diverted)
                given = diverted.give_back()
            flip.put_back(self._links, self._way)
            if diverted is not None:
                given += diverted.give_back()  # what went there while we did that
        finally:
            if diverted is not None:
                diverted.close()
            self._drained.set()
        _tell(state=state, frames=given)

    def arm(self) -> None:
        """From now on a stop is the switchover, and what the tap is sent is kept for a moment."""
        if self._swallowed is None:
            try:
                self._swallowed = Swallowed(self._links, self._way)
            except (OSError, VirtgridError) as error:  # the tap is gone, and the guest with it
                _tell(state="failed", text=str(error))
                return
            asyncio.get_running_loop().add_reader(self._swallowed, self._swallowed.take)
            with contextlib.suppress(OSError):
                self._divert()
            self._look(_LOOKS)
        _tell(state="armed")

    def _look(self, times: int) -> None:
        if self._swallowed is not None and not self._flipped and times:
            with contextlib.suppress(OSError, VirtgridError):
                self._swallowed.look()
            asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look, times - 1)

    def disarm(self) -> None:
        if self._swallowed is not None:
            asyncio.get_running_loop().remove_reader(self._swallowed)
            self._swallowed.close()
            self._swallowed = None

    def on_event(self, event: QemuEvent) -> None:
        """STOP or RESUME of some guest of this host."""
        if event.uuid != self._uuid:
            return
        try:
            if event.name == "STOP" and self._swallowed is not None and not self._flipped:
                self._flip(event.clock_s, self._swallowed)
            elif event.name == "RESUME" and self._flipped:
                self._give_back("put back")
                self._back.set()
        except Exception as error:
            _tell(state="failed", text=f"{type(error).__name__}: {error}")

    def _flip(self, stopped_s: float, swallowed: Swallowed) -> None:
        self._flipped = True
        drained = self._turned_s is not None
        if not drained:
            flip.turn(self._links, self._way)
            self._turned_s = time.time()
        assert self._turned_s is not None
        after_s = self._turned_s - stopped_s
        self._drained.set()
        sent = swallowed.send_again()
        loop = asyncio.get_running_loop()

        def late_ones() -> None:
            nonlocal sent
            sent += swallowed.send_again()

        def relax() -> None:
            late_ones()
            self.disarm()
            if self._flipped:
                flip.relax(self._links, self._way)
                _tell(state="flipped", after_s=round(after_s, 6), replayed=sent)

        loop.call_later(_UNDER_WAY_S, late_ones)
        loop.call_later(_RELAX_AFTER_S, relax)


async def _serve(order: dict[str, Any], reader: asyncio.StreamReader) -> None:
    way = Way(**order["way"])
    with Links() as links:
        # Whatever an earlier migration left of this guest's: it runs here now.
        flip.put_back(links, way)
        flipper = Flipper(links, way, order["uuid"])
        async with await Hypervisor.open(order["uri"], name="the source (flip)") as source:
            await source.on_qemu_event("^(STOP|RESUME)$", flipper.on_event)
            _tell(state="ready")
            while word := await reader.readline():
                match word.split():
                    case [b"arm"]:
                        flipper.arm()
                    case [b"drain", for_s]:
                        flipper.drain(float(for_s))
                    case [b"end"]:
                        flipper.end()
                        return
            await flipper.see_it_through(_ORPHAN_S)  # the parent has died


async def _run() -> None:
    reader = asyncio.StreamReader(limit=_ORDER_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    order = json.loads(await reader.readline())
    try:
        await _serve(order, reader)
    except (VirtgridError, OSError) as error:
        _tell(
            state="failed", text=error.cause or error.what if isinstance(error, VirtgridError) else str(error)
        )


def _tell(**fields: Any) -> None:
    with contextlib.suppress(OSError):  # the parent is gone
        os.write(1, json.dumps(fields).encode() + b"\n")


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to judge
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    be_real_time()  # for the threads to come as well
    asyncio.run(_run())
    os._exit(0)  # a libvirt call that hangs must not keep the process


if __name__ == "__main__":
    _main()

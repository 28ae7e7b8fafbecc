"""``virtgrid track DOMAIN``: a running guest's connections as they come, wait and go."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from rich.console import Console
from rich.live import Live

from virtgrid.cli.keys import Interrupts, key_presses
from virtgrid.cli.output import console, interactive, print_json
from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import RefusedError
from virtgrid.migration.facts import tap_of
from virtgrid.net.addresses import parse_mac
from virtgrid.net.capture import TapWatcher
from virtgrid.report.tracking import Scene, Selection, change_line, count_line, render
from virtgrid.tracker.definition import load_all
from virtgrid.tracker.tracker import Change, Tracker
from virtgrid.tracker.views import Snapshot
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.domain import Domain

_POLL_S: Final = 0.1
_REDRAW_S: Final = 0.5
#: Looking at ten thousand connections takes a while: at most this share of the time is spent on it.
_LOOKING_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """Who is followed, and where."""

    name: str
    uuid: str
    tap: str
    mac: str


def find(uri: str, domain: str, tap: str | None) -> Guest:
    """The guest and its tap. Errors: PeerUnreachableError, NotFoundError, UsageError, RefusedError."""

    async def ask() -> Guest:
        async with await Hypervisor.open(uri) as hypervisor:
            found = await Domain.find(hypervisor, domain)
            nic, problem = tap_of(await found.xml(), tap)
            if nic is None or nic.tap is None or problem is not None:
                raise RefusedError(
                    f"the connections of {found.name} cannot be followed",
                    cause=problem,
                    hint="a domain has its tap while it runs, on its host",
                )
            return Guest(name=found.name, uuid=found.uuid, tap=nic.tap, mac=nic.mac)

    return asyncio.run(ask())


def follow(
    guest: Guest,
    selection: Selection,
    *,
    large_bytes: int,
    for_s: float | None,
    as_json: bool,
    known: bytes | None = None,
) -> Tracker:
    """Show the guest's connections until Ctrl-C, the time is over, or the guest has gone.

    known: what another tracker knew of them, from which the guest has run on. Returns this one, as it is at
    the end. Errors: RefusedError.
    """
    tracker = Tracker(load_all(), guest_macs=[parse_mac(guest.mac)], large_bytes=large_bytes)
    if known is not None:
        tracker.import_state(known, time.monotonic(), unwatched=True)
    with contextlib.ExitStack() as stack:
        watcher = stack.enter_context(TapWatcher(guest.tap, guest.mac, tracker, SystemClock()))
        interrupts = stack.enter_context(Interrupts())
        pressed = stack.enter_context(key_presses())
        out = stack.enter_context(_output(guest, selection, as_json))
        began_s = time.monotonic()

        def scene() -> Scene:
            return Scene(
                domain=guest.name,
                tap=guest.tap,
                capture=watcher.capture,
                elapsed_s=time.monotonic() - began_s,
                dropped=watcher.dropped,
                snapshot=watcher.snapshot(),
            )

        end = None
        out.began(watcher.capture)
        draw_s = began_s
        while end is None:
            for change in watcher.drain_events():
                out.changed(change)
            if watcher.state == "gone":
                end = f"{guest.tap} has gone: {guest.name} stopped or moved away"
            elif interrupts.count or pressed() == "q":
                end = "ended by Ctrl-C" if interrupts.count else "ended by q"
            elif for_s is not None and time.monotonic() >= began_s + for_s:
                end = "the time is over"
            elif out.draws and time.monotonic() >= draw_s:
                looked_s = time.monotonic()
                out.draw(scene())
                took_s = time.monotonic() - looked_s
                draw_s = looked_s + max(_REDRAW_S, took_s / _LOOKING_SHARE)
            if end is None:
                time.sleep(_POLL_S)
        last = scene()
        for change in watcher.drain_events():
            out.changed(change)
        out.ended(last, end)
    return tracker


class _Output(Protocol):
    """Where the news go. draws: whether it wants to be shown a scene now and then."""

    draws: bool

    def began(self, capture: str) -> None: ...

    def changed(self, change: Change) -> None: ...

    def draw(self, scene: Scene) -> None: ...

    def ended(self, scene: Scene, why: str) -> None: ...


@contextlib.contextmanager
def _output(guest: Guest, selection: Selection, as_json: bool) -> Iterator[_Output]:
    if as_json:
        yield _JsonLines(guest, selection)
    elif not interactive():
        yield _Lines(guest, selection)
    else:
        screen = console()
        with Live(console=screen, auto_refresh=False, transient=False, vertical_overflow="crop") as live:
            yield _Screen(screen, live, selection)


def _clock(at_s: float) -> datetime:
    """The time of day of a moment on CLOCK_MONOTONIC."""
    return datetime.fromtimestamp(time.time() - time.monotonic() + at_s).astimezone()


class _JsonLines:
    """One object a line: ``began``, a ``change`` for each, and at the end the ``snapshot``."""

    draws = False

    def __init__(self, guest: Guest, selection: Selection) -> None:
        self._guest = guest
        self._selection = selection

    def began(self, capture: str) -> None:
        guest = self._guest
        told = {"domain": guest.name, "uuid": guest.uuid, "tap": guest.tap, "capture": capture}
        print_json({"event": "began", "at": _clock(time.monotonic()), **told}, line=True)

    def changed(self, change: Change) -> None:
        if not self._selection.wants(change):
            return
        told: dict[str, Any] = {
            "event": "change",
            "at": _clock(change.at_s),
            "client": change.client,
            "server": change.server,
            "protocol": change.protocol,
            "verdict": change.verdict,
            "state": change.state,
            "reason": change.reason,
        }
        print_json(told, line=True)

    def draw(self, scene: Scene) -> None:
        return

    def ended(self, scene: Scene, why: str) -> None:
        now: Snapshot = scene.snapshot
        print_json(
            {
                "event": "snapshot",
                "at": _clock(now.at_s),
                "ended": why,
                "total": now.total,
                "unsuitable": now.unsuitable,
                "unknown": now.unknown,
                "frames_lost": scene.dropped,
                "connections": [
                    {**one.as_dict(), "verdict": str(one.verdict), "since_s": now.at_s - one.since_s}
                    for one in self._selection.chosen(now)
                ],
            },
            line=True,
        )


class _Lines:
    """For pipes and logs: a line for each change, and the counts at the end."""

    draws = False

    def __init__(self, guest: Guest, selection: Selection) -> None:
        self._guest = guest
        self._selection = selection

    def began(self, capture: str) -> None:
        print(f"following {self._guest.name} on {self._guest.tap}, capture {capture}", flush=True)

    def changed(self, change: Change) -> None:
        if self._selection.wants(change):
            clock = _clock(change.at_s).isoformat(sep=" ", timespec="milliseconds")[11:23]
            print(change_line(change, clock), flush=True)

    def draw(self, scene: Scene) -> None:
        return

    def ended(self, scene: Scene, why: str) -> None:
        print(count_line(scene))
        print(why)


class _Screen:
    """For a person: the connections, kept current; the last screen stays."""

    draws = True

    def __init__(self, screen: Console, live: Live, selection: Selection) -> None:
        self._console = screen
        self._live = live
        self._selection = selection

    def began(self, capture: str) -> None:
        return

    def changed(self, change: Change) -> None:
        return

    def draw(self, scene: Scene, *, keys: bool = True) -> None:
        size = self._console.size
        self._live.update(
            render(scene, self._selection, width=size.width, height=size.height, keys=keys), refresh=True
        )

    def ended(self, scene: Scene, why: str) -> None:
        self.draw(scene, keys=False)
        self._live.console.print(why)
